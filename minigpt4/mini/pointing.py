"""Do the maps of inference/attribution.py point at what a word means? Of the drawn scenes it is known where that is.

    python -m minigpt4.mini.pointing                  # eval_configs/mini_eval.yaml, some minutes on two cores
    python -m minigpt4.mini.pointing --scenes 20 --options model.ckpt=output/mini/seed1/flickr30k.pth

Of each test scene the caption's first word for each kind of thing that is there is asked about.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.evaluation.command import main, parser_of
from minigpt4.evaluation.report import Table
from minigpt4.inference.attribution import Trace
from minigpt4.inference.pipeline import Pipeline, PromptRules, pipeline
from minigpt4.mini.files import TRUTH_FILE, WORLD_FILE
from minigpt4.mini.report import mentions
from minigpt4.mini.scenes import SIDE, Scene, draw, sample_scenes
from minigpt4.processors import open_image

REMOVED = 0.1
"""Share of the patches that the deletion test takes away."""
HEAD = ("method", "in its drawing", "of other scenes", "strongest patches removed", "random patches removed")
GRID = 64
"""Points of a side, to measure an area."""
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of the picture; a point has x, y."""


def boxes_of(scene: Scene) -> list[list[Box]]:
    """Where the things of each group are drawn."""
    found: list[list[Box]] = [[] for _ in scene.groups]
    for group, drawing, (left, top) in draw(scene)[1]:
        edges = (left, top, left + drawing.width, top + drawing.height)
        found[group].append(tuple(edge / SIDE for edge in edges))
    return found


def strongest(map_hw: np.ndarray) -> Point:
    """The middle of the strongest patch."""
    height, width = map_hw.shape
    row, column = divmod(int(map_hw.argmax()), width)
    return (column + 0.5) / width, (row + 0.5) / height


def hits(point: Point, boxes: Sequence[Box]) -> bool:
    """Whether a point is in one of the boxes."""
    x, y = point
    return any(left <= x < right and top <= y < bottom for left, top, right, bottom in boxes)


def without(pixels_3SS: Tensor, patches: Sequence[int], side: int) -> Tensor:
    """The image with some of its `side` x `side` patches in the median colour, which is the background's."""
    gone_hw = torch.zeros(side * side, dtype=torch.bool)
    gone_hw[list(patches)] = True
    zoom = pixels_3SS.shape[-1] // side
    gone_SS = gone_hw.view(side, side).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    return torch.where(gone_SS, pixels_3SS.flatten(1).median(dim=1).values[:, None, None], pixels_3SS)


@dataclass
class Finding:
    """What was found about one word for a group of things."""

    scene: int
    group: int
    maps: dict[str, np.ndarray]
    """(h, w) by method."""
    drops: dict[str, float]
    """By what was removed, how far the word's log-probability fell, nats: by method, and "random"."""


def ask(model: Pipeline, images: Sequence[Path], scenes: Sequence[Scene]) -> Iterator[Finding]:
    """Of all kinds that the captions name and that are there."""
    prompt, draws = PromptRules.of(model.cfg).prompt, np.random.default_rng(0)
    for number, (image, scene) in enumerate(zip(images, scenes, strict=True)):
        pixels_3SS, caption = model.processor(open_image(image)), model.caption(image)
        names, seen = [group.thing.name for group in scene.groups], set()
        for match, kind in mentions(caption):
            if kind not in names or kind in seen:
                continue
            seen.add(kind)
            said = caption[: match.end()]
            words = slice(-len(match.group().split()), None)

            def trace(pixels: Tensor, said: str = said) -> Trace:
                return Trace(model.model, pixels[None], prompt, said)

            whole = trace(pixels_3SS)
            maps = {name: own[0] for name, own in whole.maps(range(len(whole.words))[words]).items()}
            side = len(next(iter(maps.values())))
            order = {name: map_hw.argsort(axis=None)[::-1] for name, map_hw in maps.items()}
            order["random"] = draws.permutation(side * side)
            count = max(1, round(REMOVED * side * side))
            less = {name: trace(without(pixels_3SS, own[:count].tolist(), side)) for name, own in order.items()}
            drops = {n: float((whole.log_probs[words] - own.log_probs[words]).sum()) for n, own in less.items()}
            yield Finding(number, names.index(kind), maps, drops)


def summary(findings: Sequence[Finding], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Shares 0..1 and mean drops in nats.

    `shuffled`: the same maps, scored by the boxes of every group of every other scene. `middle`: the same of a pointer
    that is always right, in the middle of a drawing: as scenes are built alike, more than `area`, the boxes' share.
    """
    boxes = [boxes_of(scene) for scene in scenes]
    own = [boxes[one.scene][one.group] for one in findings]

    def shuffled(points: Sequence[Point]) -> float:
        return mean(
            mean(hits(point, group) for group in groups)
            for one, point in zip(findings, points, strict=True)
            for number, groups in enumerate(boxes)
            if number != one.scene
        )

    methods = {}
    for name in findings[0].maps:
        points = [strongest(one.maps[name]) for one in findings]
        fell, random = (np.array([one.drops[which] for one in findings]) for which in (name, "random"))
        methods[name] = {
            "pointing": mean(hits(*pair) for pair in zip(points, own, strict=True)),
            "shuffled": shuffled(points),
            "drop": float(fell.mean()),
            "drop_random": float(random.mean()),
            "falls_more": float((fell > random).mean()),
        }
    everywhere = [((x + 0.5) / GRID, (y + 0.5) / GRID) for x in range(GRID) for y in range(GRID)]
    area = mean(hits(point, group) for group in own for point in everywhere)
    middles = [((left + right) / 2, (top + bottom) / 2) for (left, top, right, bottom), *_ in own]
    return {"words": len(findings), "methods": methods, "area": area, "middle": shuffled(middles)}


def run(args: argparse.Namespace) -> None:
    """Ask, and print the table."""
    with errors_as(ConfigError, f"--data {args.data}: is no mini world (bash quickstart.sh draws it)"):
        size = json.loads((args.data / WORLD_FILE).read_text(encoding="utf-8"))
        ids = list(json.loads((args.data / TRUTH_FILE).read_text(encoding="utf-8")))[: args.scenes]
        scenes = list(sample_scenes("test", size["flickr_test"], size["seed"]))[: len(ids)]
    if len(scenes) < 2:
        raise ConfigError("--scenes: at least 2, for the maps of one are compared with the others")
    images = [args.data / "flickr30k" / "flickr30k-images" / f"{image_id}.jpg" for image_id in ids]
    findings = list(ask(pipeline(args.cfg_path, args.options or ()), images, scenes))
    if not findings:
        raise ConfigError(f"{args.cfg_path}: its captions name nothing that is there; is the model trained?")
    found = summary(findings, scenes)
    rows = [
        [name, f"{own['pointing']:.1%}", f"{own['shuffled']:.1%}", f"-{own['drop']:.2f}", f"-{own['drop_random']:.2f}"]
        for name, own in found["methods"].items()
    ]
    sys.stdout.write(Table(HEAD, rows).markdown())
    falls = ", ".join(f"{own['falls_more']:.1%} ({name})" for name, own in found["methods"].items())
    sys.stdout.write(
        f"\n{found['words']} words. Drawings cover {found['area']:.1%} of a picture; the middle of the right one is in "
        f"{found['middle']:.1%} of those of other scenes.\nThe strongest {REMOVED:.0%} of the patches cost a word more "
        f"than random ones in {falls} of the cases.\n"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--cfg-path", default="eval_configs/mini_eval.yaml", help="YAML file with the model")
    parser.add_argument("--data", type=Path, default=Path("data/mini"), help="the mini world")
    parser.add_argument("--scenes", type=int, help="only so many of the test scenes (all)")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(run, parse_args()))
