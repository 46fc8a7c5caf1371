"""Greedy answers of vLLM, with the plugin for `blip2` exports, against ours: ids of prompts and answers.

    pip install vllm  # in an environment of its own, with this package beside it
    python benchmarks/vllm_parity.py RUN --format blip2 --images FOLDER --limit 4 --options model.llm_precision=fp32
Asked are one image, two in one prompt, and none.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from minigpt4 import export
from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.inference.image_list import find_images
from minigpt4.inference.pipeline import Pipeline
from minigpt4.models.generation import generate_ids
from minigpt4.models.transformers_layout import IMAGE_TOKEN
from minigpt4.processors import open_image
from minigpt4.serving import VLLM_ARCHITECTURE

QUESTIONS = ((f"{IMAGE_TOKEN} Describe it.", 1), (f"Is {IMAGE_TOKEN} like {IMAGE_TOKEN} here?", 2), ("Who are you?", 0))


@torch.inference_mode()
def ours(pipeline: Pipeline, prompt: str, images: list[Image.Image], tokens: int, image_id: int) -> list[list[int]]:
    """Ids of the prompt, with `image_id` for each image token, and of the answer."""
    model, prompt = pipeline.model, prompt.replace(IMAGE_TOKEN, IMAGE_PLACEHOLDER)
    embeds = [model.project(model.image_features(pipeline.processor(image)[None])) for image in images]
    (row,), _ = model.prompt_rows([prompt], [embeds])
    inputs = model.prompt_embeds([prompt], [embeds])
    answer = generate_ids(model.llama_model, model.llama_tokenizer, *inputs, Decoding(max_new_tokens=tokens), [])
    ids = [token if place < 0 else image_id for token, place in zip(row.ids, row.images, strict=True)]
    return [ids, answer[0, 1:].tolist()]


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where ids differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="as python -m minigpt4.export takes it")
    parser.add_argument("--format", choices=("blip2", "llava"), required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder or list of images")
    parser.add_argument("--image-folder", type=Path)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    config = export.source_of(args.run, None, args.options)
    pictures = [open_image(item.file) for item in find_images(args.images, args.image_folder, args.limit, seed=0)]
    asked = [
        (config.model.prompt_template.format(question), [pictures[(start + n) % len(pictures)] for n in range(count)])
        for start in range(len(pictures))
        for question, count in QUESTIONS
    ]
    with tempfile.TemporaryDirectory() as folder:
        written = ["--options", *args.options] if args.options else []
        if status := export.main([args.run, "--format", args.format, "--output", folder, *written]):
            return status
        image_id = json.loads((Path(folder) / "config.json").read_text())["image_token_index"]
        overrides = {"architectures": [VLLM_ARCHITECTURE]} if args.format == "blip2" else None
        sizes = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 512, "dtype": "float32"}
        limit = {"image": 2}
        llm = LLM(folder, hf_overrides=overrides, limit_mm_per_prompt=limit, enforce_eager=True, **sizes)
        requests = [{"prompt": prompt} | ({"multi_modal_data": {"image": own}} if own else {}) for prompt, own in asked]
        how = SamplingParams(temperature=0, max_tokens=args.max_new_tokens)
        theirs = [[row.prompt_token_ids, list(row.outputs[0].token_ids)] for row in llm.generate(requests, how)]
    pipeline = Pipeline(config, "cpu")
    mine = [ours(pipeline, *one, args.max_new_tokens, image_id) for one in asked]
    same = [sum(a[part] == b[part] for a, b in zip(mine, theirs, strict=True)) for part in (0, 1)]
    print(f"of {len(mine)} questions with the same ids: {same[0]} prompts, {same[1]} greedy answers")
    return int(same != [len(mine)] * 2)


if __name__ == "__main__":
    sys.exit(main())
