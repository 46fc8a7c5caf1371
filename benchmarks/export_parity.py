"""Greedy captions of an export by stock transformers, against ours: how many have the same tokens.

    python benchmarks/export_parity.py eval_configs/mini_flickr_eval.yaml --format blip2 \
        --images data/mini/flickr30k/flickr30k_grounded_detail_test.json \
        --image-folder data/mini/flickr30k/flickr30k-images \
        --options model.ckpt=output/mini/flickr30k.pth model.llm_precision=fp32
With transformers' two ways to resize: by Pillow, as here, and by torchvision, its default.
"""

import argparse
import dataclasses
import operator
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from minigpt4 import export
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.inference.image_list import find_images
from minigpt4.inference.pipeline import Pipeline, PromptRules
from minigpt4.models.generation import generate_ids
from minigpt4.models.transformers_layout import IMAGE_TOKEN, LAYOUTS
from minigpt4.processors import open_image


def answer(ids: torch.Tensor, ends: set[int]) -> list[int]:
    """Without what fills a row after its end token."""
    row = ids.tolist()
    return row[: next((place for place, token in enumerate(row, start=1) if token in ends), len(row))]


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if captions differ where the pixels are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="as python -m minigpt4.export takes it")
    parser.add_argument("--format", choices=LAYOUTS, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder or list of images")
    parser.add_argument("--image-folder", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--max-new-tokens", type=int, default=90)
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(argv)

    config = export.source_of(args.run, None, args.options)
    rules = PromptRules.of(config)
    decoding = dataclasses.replace(rules.decoding, num_beams=1, do_sample=False, max_new_tokens=args.max_new_tokens)
    prompt = config.model.as_read(rules.prompt).replace(IMAGE_PLACEHOLDER, IMAGE_TOKEN)
    with tempfile.TemporaryDirectory() as folder:
        written = ["--options", *args.options] if args.options else []
        if status := export.main([args.run, "--format", args.format, "--output", folder, *written]):
            return status
        ours = Pipeline(config, "cpu")
        theirs = AutoModelForImageTextToText.from_pretrained(folder)
        processors = {way: AutoProcessor.from_pretrained(folder, backend=way) for way in ("pil", "torchvision")}
        settings = theirs.generation_config
        ends = set(settings.eos_token_id)
        images = find_images(args.images, args.image_folder, args.limit, seed=0)
        same = dict.fromkeys(processors, 0)
        for start in range(0, len(images), args.batch_size):
            batch = [open_image(item.file) for item in images[start : start + args.batch_size]]
            with torch.inference_mode():
                pixels_B3SS = torch.stack([ours.processor(image) for image in batch])
                embeds_BQD = ours.model.project(ours.model.image_features(pixels_B3SS))
                inputs = ours.model.prompt_embeds([rules.prompt] * len(batch), [[one] for one in embeds_BQD.split(1)])
                parts = ours.model.llama_model, ours.model.llama_tokenizer
                wanted = [answer(ids, ends) for ids in generate_ids(*parts, *inputs, decoding, rules.stop)[:, 1:]]
                for way, processor in processors.items():
                    inputs = processor(text=[prompt] * len(batch), images=batch, return_tensors="pt")
                    stop = {"stop_strings": settings.stop_strings, "tokenizer": processor.tokenizer}
                    rows = theirs.generate(**inputs, **stop, max_new_tokens=args.max_new_tokens)
                    found = [answer(ids, ends) for ids in rows[:, inputs["input_ids"].shape[1] :]]
                    same[way] += sum(map(operator.eq, found, wanted))
            done = start + len(batch)
            print(
                f"{done} images: " + ", ".join(f"{count} identical by {way}" for way, count in same.items()), flush=True
            )
    return int(same["pil"] < len(images))


if __name__ == "__main__":
    sys.exit(main())
