"""Training steps of the three recipes at full size on a GPU, beside the published times.

    python benchmarks/gpu.py --dir /tmp/7b --write docs/performance.md      # 17 GB of files, made once
    python benchmarks/gpu.py --size tiny --measure                          # on a CPU: shows that it works
Without a GPU nothing is measured, and the rows say so. Random weights; the step is that of `run.amp_dtype: bf16`
with all savings but the feature cache.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from command import measured, parser_of
from sizes import SIZES, write_weights
from step import ROUND, Step, batches, ways
from tables import machine, matrix_rate, seconds_in_turn, table

WAY = "all without cache"
NOT_YET = "not measured yet"
HEAD = ("recipe", "batch", "captions", "s a step", "images/s", "of bf16 rate", "peak, GiB", "published")
RECIPES = (
    ("stage 1", 16, "short", "0.340 s, 21.7 GiB (7B, A800)"),
    ("stage 1, batch as in the paper", 64, "short", "1.8 s (13B, A100)"),
    ("stage 2", 12, "long", "0.65 s, 35.2 GiB (7B, A800)"),
    ("Flickr30k", 2, "long", "0.56 to 0.65 s, 17.8 GiB (7B, RTX 3090)"),
)
"""Name, size of the micro-batch, captions, published time."""


def _timed(step: Step, batch_size: int, captions: str, rate: float, repeats: int) -> list[str]:
    """Seconds, images a second, share of the matrix rate and peak memory."""
    source = batches(batch_size, step.model.visual_encoder.image_size, captions, step.model.device.type)
    drawn = [next(source) for _ in range(ROUND)]

    def run() -> None:
        for batch in drawn:
            step(batch)

    seconds = statistics.median(seconds_in_turn({WAY: run}, repeats)[WAY]) / ROUND
    share = sum(step.flops(batch) for batch in drawn) / ROUND / seconds / rate
    peak = max(step.peak_bytes(batch) for batch in drawn)
    return [f"{seconds:.3f}", f"{batch_size / seconds:.1f}", f"{share:.0%}", f"{peak / 2**30:.1f}"]


def section(args: argparse.Namespace, folder: Path) -> str:
    """The Markdown section."""
    is_measured = args.measure or torch.cuda.is_available()
    if is_measured:
        size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
        write_weights(folder, size, torch.bfloat16)
        (way,) = (way for way in ways("bf16") if way.name == WAY)
        step, rate = Step(way, size, folder, device), matrix_rate(torch.bfloat16, torch.device(device))
    rows = []
    for name, batch_size, captions, published in RECIPES:
        own = _timed(step, batch_size, captions, rate, args.repeats) if is_measured else [NOT_YET] * 4
        rows.append([name, str(batch_size), captions, *own, published])
    how = f"median of {args.repeats} rounds of {ROUND} steps" if is_measured else f"{NOT_YET}: no GPU"
    return (
        "## On a GPU\n\n"
        f"Training steps at size {args.size} in bf16, the image encoded in each step; {how}. Captions as "
        "in the tables of the training step. The aim for stage 1 is 60% of the measured rate of matrix products.\n\n"
        f"    python benchmarks/gpu.py --size {args.size} --repeats {args.repeats}\n\n"
        f"Machine: {machine()}.\n\n{table(HEAD, rows)}"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, weights=True)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--measure", action="store_true", help="on a CPU, too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return measured(args, "gpu", section)


if __name__ == "__main__":
    sys.exit(main())
