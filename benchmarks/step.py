"""One training step, the plain way and with each saving: seconds, ratio, memory, share of the machine's matrix rate.

    python benchmarks/step.py                                        # size mid, batch 16, long captions
    python benchmarks/step.py --size mid --batch-size 16 --captions short --write docs/performance.md
    python benchmarks/step.py --size 7b --batch-size 12 --precision bf16 --dir /tmp/7b      # on a GPU; 17 GB of files
Random weights (seed 0) in the published formats. "Plain" is what the original computes, in fp32: logits at all
positions, unfused attention, padding, the image encoded in each step. Every row is measured in turn, in the same
process, on the same batches; a ratio is the median of the rounds' own ratios.
"""

import argparse
import dataclasses
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command import measured, parser_of, section
from sizes import SIZES, TOKENIZER, Size, peak_bytes, weight_bytes, write_weights
from tables import matrix_rate, ratio, seconds_in_turn
from torch.utils.flop_counter import FlopCounterMode

from minigpt4.models.attention import compile_parts
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.prompting import ImageFeatures, read_samples
from minigpt4.models.tokenizer import load_tokenizer

WORDS = ("brown", "dog", "sleeps", "on", "a", "red", "blanket", "wooden", "boats", "are", "tied", "to", "the", "pier")
CAPTION_TOKENS = {"short": (8, 24), "long": (60, 120)}
"""Lowest and highest number of tokens: alt-texts of stage 1, descriptions of stage 2."""
PROMPT = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
ROUND = 4
"""Batches that are trained on in turn."""


PLAIN = {"llm_logits": "all", "llm_attention": "eager", "llm_packing": False, "llm_prefix_cache": False}
"""What the original computes."""


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    name: str
    precision: str = "fp32"
    features: bool = False
    compiled: bool = False
    model: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(PLAIN))
    """Keys of `model:`."""


def ways(precision: str, *, compiled: bool = False) -> list[Way]:
    """The plain way, each saving by itself, all of them, and if asked for those with torch.compile."""
    plain, attention = Way("plain"), {"llm_attention": None}
    packing = attention | {"llm_packing": True}
    prefix = packing | {"llm_prefix_cache": True}
    everything = prefix | {"llm_logits": "targets"}
    last = Way("all", precision, features=True, model=everything)
    return [
        plain,
        Way("logits at targets", model=PLAIN | {"llm_logits": "targets"}),
        Way("attention", model=PLAIN | attention),
        Way("attention, no padding", model=PLAIN | packing),
        Way("attention, no padding, prefix once", model=PLAIN | prefix),
        Way("features from the cache", features=True),
        *([Way(precision, precision)] if precision != "fp32" else []),
        Way("all without cache", precision, model=everything),
        last,
        *([dataclasses.replace(last, name="all, compiled", compiled=True)] if compiled else []),
    ]


class Step:
    """A model that computes one way, and its training step."""

    def __init__(self, way: Way, size: Size, folder: Path, device: str) -> None:
        section = size.section(folder, way.precision, **way.model)
        self.model = MiniGPT4.from_config(section, device=device).train()
        self.way = way
        if way.compiled:
            compile_parts(self.model)
        _set_vision_attention(self.model, fused=way.model["llm_attention"] is None)
        self.optimizer = torch.optim.AdamW(self.model.trainable_parameters().values(), lr=1e-4, fused=True)

    def features(self, image: torch.Tensor) -> ImageFeatures:
        """What a cache would hold."""
        return ImageFeatures(self.model.image_features(image))

    def __call__(self, batch: dict[str, Any]) -> None:
        loss = self.model(batch)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self, batch: dict[str, Any]) -> int:
        """Weights and all that a step makes, at its peak."""
        return weight_bytes(self.model) + peak_bytes(self.model, lambda: self(batch))

    def flops(self, batch: dict[str, Any]) -> int:
        """Floating-point operations of matrix products."""
        with FlopCounterMode(display=False) as counter:
            self(batch)
        return counter.get_total_flops()


def _set_vision_attention(model: MiniGPT4, fused: bool) -> None:
    for part in model.visual_encoder.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    model.Qformer.bert.set_attn_implementation("sdpa" if fused else "eager")


def batches(size: int, image_size: int, captions: str, device: str) -> Iterator[dict[str, Any]]:
    """Batches of random images and captions."""
    chance, tokenizer = random.Random(0), load_tokenizer(TOKENIZER)
    generator = torch.Generator().manual_seed(0)
    while True:
        texts = [_text(tokenizer, chance.randint(*CAPTION_TOKENS[captions]), chance) for _ in range(size)]
        image = torch.randn(size, 3, image_size, image_size, generator=generator).to(device)
        yield {"image": image, "answer": texts, "instruction_input": [PROMPT] * size}


def _text(tokenizer: Any, tokens: int, chance: random.Random) -> str:
    """Words of about so many tokens; benchmarks' tokenizer is small and cuts words into pieces."""
    text = chance.choice(WORDS)
    while len(tokenizer(text)["input_ids"]) < tokens:
        text += f" {chance.choice(WORDS)}"
    return text


def measure(args: argparse.Namespace, folder: Path) -> str:
    """The Markdown section."""
    size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    write_weights(folder, size, torch.float32 if args.size != "7b" else torch.bfloat16)
    every = ways(args.precision, compiled=args.compile)
    chosen = [way for way in every if not args.only or way.name in args.only]
    steps = {way.name: Step(way, size, folder, device) for way in chosen}
    source = batches(args.batch_size, size.section(folder, "fp32").get("image_size", 224), args.captions, device)
    drawn = [next(source) for _ in range(ROUND)]
    given = {name: [_given(step, batch) for batch in drawn] for name, step in steps.items()}

    def run(name: str) -> None:
        for batch in given[name]:
            steps[name](batch)

    seconds = seconds_in_turn({name: lambda name=name: run(name) for name in steps}, args.repeats)
    plain = steps[chosen[0].name]
    plain_peak = plain.peak_bytes(given[plain.way.name][0])
    rows = []
    for name, step in steps.items():
        faster = ratio(seconds[plain.way.name], seconds[name])
        row = (name, f"{statistics.median(seconds[name]) / ROUND:.3f}", f"{faster:.2f}")
        rows.append(row + _resources(step, given[name], statistics.median(seconds[name]), plain_peak))
    head = ("step", "median, s", "times faster", "peak memory, GiB", "of plain", "of matrix rate")
    low, high = CAPTION_TOKENS[args.captions]
    text = (
        f"Captions of {low} to {high} tokens; median of {args.repeats} rounds of {ROUND} steps. Of the plain way's "
        f"positions {_padding(plain.model, drawn):.0%} are padding, without padding none. The fp32 rows compute "
        f'with `torch.set_float32_matmul_precision("{torch.get_float32_matmul_precision()}")`.'
    )
    title = f"### Training step, size {args.size}, batch {args.batch_size}, {args.captions} captions, {args.precision}"
    return section(args, "step", title, text, head, rows)


def _resources(step: Step, batches: list[dict[str, Any]], seconds: float, plain_peak: int) -> tuple[str, ...]:
    """Memory and share of the matrix rate; not counted for compiled parts, whose operations no counter sees."""
    if step.way.compiled:
        return ("", "", "")
    peak = step.peak_bytes(batches[0])
    rate = matrix_rate(next(step.model.llama_model.parameters()).dtype, step.model.device)
    done = sum(step.flops(batch) for batch in batches) / seconds
    return f"{peak / 2**30:.2f}", f"{peak / plain_peak:.0%}", f"{done / rate:.0%}"


def _padding(model: MiniGPT4, drawn: list[dict[str, Any]]) -> float:
    """Share of positions that a padded batch computes for nothing."""
    padded = [model.training_batch(read_samples(batch))[0] for batch in drawn]
    return 1 - sum(int(batch.lengths_B.sum()) for batch in padded) / sum(batch.ids_BT.numel() for batch in padded)


def _given(step: Step, batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "image": step.features(batch["image"])} if step.way.features else batch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, weights=True)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--captions", choices=CAPTION_TOKENS, default="long")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the last rows (bf16)")
    parser.add_argument("--compile", action="store_true", help="also measure `run.compile`")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--only", nargs="*", help="names of rows; the first is what the others are compared with")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return measured(args, f"step {args.size} {args.batch_size} {args.captions} {args.precision}", measure)


if __name__ == "__main__":
    sys.exit(main())
