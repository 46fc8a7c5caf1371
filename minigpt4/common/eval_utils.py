"""The published helpers of evaluation scripts, for code that is written against them."""

import argparse
from collections.abc import Sequence
from typing import Any


def eval_parser() -> argparse.ArgumentParser:
    """The published command line; None stands for what the configuration says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-path", required=True, help="YAML file with the model")
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="override config values")
    parser.add_argument("--name", default="A2", help="name of the evaluation")
    parser.add_argument("--ckpt", help="trained weights (model.ckpt)")
    parser.add_argument("--eval_opt", default="all", help="what is evaluated")
    parser.add_argument("--max_new_tokens", type=int, default=10, help="longest answer")
    parser.add_argument("--batch_size", type=int, default=32, help="prompts that are answered together")
    parser.add_argument("--lora_r", type=int, help="rank of LoRA (model.lora_r)")
    parser.add_argument("--lora_alpha", type=int, help="scale of LoRA (model.lora_alpha)")
    return parser


def prepare_texts(texts: Sequence[str], conv_temp: Any) -> list[str]:
    """A prompt in the conversation template `conv_temp` for each text, with an image before it and an open answer."""
    prompts = []
    for text in texts:
        conv = conv_temp.copy()
        conv.add_image()
        conv.append_question(text)
        conv.open_answer()
        prompts.append(conv.get_prompt())
    return prompts


def init_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model, on the first GPU if there is one, and image processor of `args.cfg_path` with `args.options`.

    `ckpt`, `lora_r` and `lora_alpha` go over the file where they are given. Errors are those of `minigpt4.pipeline`.
    """
    from minigpt4.inference.pipeline import pipeline

    given = {key: getattr(args, key, None) for key in ("ckpt", "lora_r", "lora_alpha")}
    own = [f"model.{key}={value}" for key, value in given.items() if value is not None]
    loaded = pipeline(args.cfg_path, [*(args.options or []), *own])
    return loaded.model, loaded.processor


def computeIoU(bbox1: Sequence[float], bbox2: Sequence[float]) -> float:  # noqa: N802 - the published name
    """Intersection over union of two boxes (x1, y1, x2, y2) whose last pixels belong to them, as published."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(0, x2 - x1 + 1) * max(0, y2 - y1 + 1)

    low, high = zip(*((max(pair), min(pair)) for pair in zip(bbox1, bbox2, strict=True)), strict=True)
    common = area(*low[:2], *high[2:])
    return common / (area(*bbox1) + area(*bbox2) - common)
