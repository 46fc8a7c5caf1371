"""Images a second of the data workers, the plain way and ours, and how many workers a GPU at full speed needs.

    python benchmarks/loader.py --write docs/performance.md
    python benchmarks/loader.py --sizes 640x480 --repeats 1 --seconds 1
"Plain" is what the original does: PIL opens the file and converts it, torchvision resizes and normalises it, torch's
DataLoader sends float32 batches. The training and the evaluation processor do the same to an image, as published.
"""

import argparse
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from command import measured, parser_of, section
from loader_stages import STAGES, stages
from loader_ways import SIZE, SOURCES, WAYS, Files, batches, pictures
from tables import in_turn, ratio, synchronised_time, table

from minigpt4.common.errors import ConfigError

SIZES = ("256x256", "640x480", "1600x1200")
WARM_UP = 2
"""Batches before the clock starts."""
EATEN = {
    "stage 1, 13B, A100 (paper: 20,000 updates of 256 in 10 h on 4 GPUs)": 36.0,
    "stage 1, 7B, A800 (a user's log: 0.34 s a step, batch 16 a GPU)": 16 / 0.34,
    "stage 2, 7B, A800 (a user's log: 0.65 s a step, batch 12)": 12 / 0.65,
    "Flickr30k, 7B, RTX 3090 (the project's log: 0.56 s a step, batch 2)": 2 / 0.56,
}
"""Images a second that one GPU trained on, as published."""
NEEDED_BY = "640x480"
"""Size whose rates say how many workers that takes, if it is measured."""


def rate(way: str, source: str, files: Files, args: argparse.Namespace, workers: int) -> float:
    """Images a second on the training device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with batches(way, source, files, args.batch_size, workers, device) as own:
        for _ in range(WARM_UP):
            next(own)
        count, start = 0, synchronised_time()
        while time.perf_counter() - start < args.seconds:
            count += len(next(own))
        return count / (synchronised_time() - start)


def rates(files: Files, args: argparse.Namespace) -> dict[tuple[str, str, int], list[float]]:
    """Rounds by source, way and number of workers, measured in turn."""
    found: dict[tuple[str, str, int], list[float]] = {
        (source, way, workers): [] for source in SOURCES for workers in (1, args.workers) for way in WAYS
    }
    for source, way, workers in in_turn(found, args.repeats):
        found[source, way, workers].append(rate(way, source, files, args, workers))
    return found


def measure(args: argparse.Namespace, folder: Path) -> str:
    """The Markdown section."""
    if min(args.images, args.batch_size, args.workers, args.repeats) < 1:
        raise ConfigError("it takes one image, one worker and one round at least")
    rows: list[list[str]] = []
    columns: dict[str, dict[str, tuple[float, float]]] = {}
    needed: dict[str, float] = {}
    for size in args.sizes:
        contents = pictures(*_sides(size), args.images)
        files = Files(folder / size, folder / f"{size}.tar")
        files.write(contents)
        found = rates(files, args)
        rows += _rate_rows(size, found, args.workers)
        columns[f"{size}, {statistics.mean(map(len, contents)) / 1024:.0f} KiB"] = stages(files, args.batch_size)
        if size == NEEDED_BY or not needed:
            needed = {way: statistics.median(found["folder", way, 1]) for way in WAYS}
        files.remove()
    return _section(args, rows, columns, needed)


def _rate_rows(size: str, found: dict[tuple[str, str, int], list[float]], workers: int) -> list[list[str]]:
    rows = []
    for way in WAYS:
        cells = [found[source, way, count] for source in SOURCES for count in (1, workers)]
        # A rate is one over a time, so plain and own change places.
        faster = ratio(found["folder", way, 1], found["folder", "plain", 1])
        rows.append([size, way, *(f"{statistics.median(cell):.0f}" for cell in cells), f"{faster:.2f}"])
    return rows


def _section(
    args: argparse.Namespace,
    rows: Sequence[Sequence[str]],
    columns: dict[str, dict[str, tuple[float, float]]],
    needed: dict[str, float],
) -> str:
    many = f"{args.workers} workers"
    head = ["JPEG", "way", "folder, 1 worker", f"folder, {many}", "tar, 1 worker", f"tar, {many}", "times faster"]
    text = (
        f"Images a second on the training device, batches of {args.batch_size}: {args.images} JPEG files drawn with "
        f"the spectrum of photos, resized to {SIZE}; median of {args.repeats} rounds of {args.seconds:g} s, the ways "
        "in turn. Times faster than plain: folder, 1 worker."
    )
    stages_rows = [[stage, *("{:.2f} / {:.2f}".format(*own[stage]) for own in columns.values())] for stage in STAGES]
    return (
        f"{section(args, 'loader', '## Data workers', text, head, rows)}\n"
        f"Milliseconds an image, plain / ours, in one process:\n\n{table(['stage', *columns], stages_rows)}\n"
        "Workers that one GPU needs so that it never waits, by the rates of one worker from a folder above "
        f"({NEEDED_BY if NEEDED_BY in args.sizes else args.sizes[0]}), if each has a core of its own:\n\n"
        f"{_needs(needed)}"
    )


def _needs(needed: dict[str, float]) -> str:
    rows = [
        [name, f"{eaten:.1f}", *(str(math.ceil(eaten / own)) for own in needed.values())]
        for name, eaten in EATEN.items()
    ]
    rows.append(["this code on a GPU", "not measured yet", *["-"] * len(needed)])
    return table(["run", "images/s a GPU", *(f"workers, {name}" for name in needed)], rows)


def _sides(size: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not found:
        raise ConfigError(f"--sizes: {size!r} is not WIDTHxHEIGHT such as 640x480")
    return int(found[1]), int(found[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WxH", help=f"of the files ({' '.join(SIZES)})")
    parser.add_argument("--images", type=int, default=64, help="files of each size (64)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="n of n workers (cores)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a measurement (2)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return measured(parse_args(argv), "loader", measure)


if __name__ == "__main__":
    sys.exit(main())
