"""Training steps of the three recipes at full size on a GPU, beside the published times.

    python benchmarks/gpu.py --dir /tmp/7b --write docs/performance.md      # 17 GB of files, made once
    python benchmarks/gpu.py --size tiny --measure                          # on a CPU: shows that it works
Without a GPU nothing is measured, and the rows say so. Random weights; the step is that of `run.amp_dtype: bf16`
with all savings but the feature cache.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from command import parser_of, publish, weights_folder
from sizes import SIZES, write_weights
from step import ROUND, Step, batches, ways
from tables import machine, matrix_rate, seconds_in_turn, table

from minigpt4.common.utils import exit_status

MARK = "gpu"
WAY = "all without cache"
PRECISION = "bf16"
NOT_YET = "not measured yet"
HEAD = ("recipe", "batch", "captions", "s a step", "images/s", "of bf16 rate", "peak, GiB", "published")


@dataclass(frozen=True)
class Recipe:
    """What a GPU does in one micro-batch of a recipe."""

    name: str
    batch_size: int
    captions: str
    published: str


RECIPES = (
    Recipe("stage 1", 16, "short", "0.340 s, 21.7 GiB (7B, A800)"),
    Recipe("stage 1, batch as in the paper", 64, "short", "1.8 s (13B, A100)"),
    Recipe("stage 2", 12, "long", "0.65 s, 35.2 GiB (7B, A800)"),
    Recipe("Flickr30k", 2, "long", "0.56 to 0.65 s, 17.8 GiB (7B, RTX 3090)"),
)


def measure(args: argparse.Namespace, folder: Path) -> list[list[str]]:
    """A row for each recipe."""
    size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    write_weights(folder, size, torch.bfloat16)
    (way,) = (way for way in ways(PRECISION) if way.name == WAY)
    step = Step(way, size, folder, device)
    rate = matrix_rate(torch.bfloat16, torch.device(device))
    return [_row(recipe, step, rate, args.repeats) for recipe in RECIPES]


def _row(recipe: Recipe, step: Step, rate: float, repeats: int) -> list[str]:
    side = step.model.visual_encoder.image_size
    source = batches(recipe.batch_size, side, recipe.captions, step.model.device.type)
    drawn = [next(source) for _ in range(ROUND)]

    def run() -> None:
        for batch in drawn:
            step(batch)

    seconds = statistics.median(seconds_in_turn({WAY: run}, repeats)[WAY]) / ROUND
    share = sum(step.flops(batch) for batch in drawn) / ROUND / seconds / rate
    peak = max(step.peak_bytes(batch) for batch in drawn)
    shown = [f"{seconds:.3f}", f"{recipe.batch_size / seconds:.1f}", f"{share:.0%}", f"{peak / 2**30:.1f}"]
    return [recipe.name, str(recipe.batch_size), recipe.captions, *shown, recipe.published]


def section(args: argparse.Namespace, rows: list[list[str]] | None) -> str:
    """The Markdown section; None: nothing could be measured."""
    empty = [[r.name, str(r.batch_size), r.captions, *[NOT_YET] * 4, r.published] for r in RECIPES]
    measured = f"median of {args.repeats} rounds of {ROUND} steps" if rows else f"{NOT_YET}: no GPU"
    return (
        "## On a GPU\n\n"
        f"Training steps at size {args.size} in {PRECISION}, the image encoded in each step; {measured}. Captions as "
        "in the tables of the training step. The aim for stage 1 is 60% of the measured rate of matrix products.\n\n"
        f"    python benchmarks/gpu.py --size {args.size} --repeats {args.repeats}\n\n"
        f"Machine: {machine()}.\n\n{table(HEAD, rows or empty)}"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, weights=True)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--measure", action="store_true", help="on a CPU, too")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    rows = None
    if args.measure or torch.cuda.is_available():
        with weights_folder(args) as folder:
            rows = measure(args, folder)
    text = section(args, rows)
    publish(args, MARK, text)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
