"""The quickstart's report: the table of metrics, how true the captions are, a figure, and what to do next.

    python -m minigpt4.mini.report output/mini output/mini/evaluation data/mini

Reads the captions and metrics of the evaluation and `scenes_test.json`; writes `report.md`, `report.txt` (the same
for a terminal), `report.json` and `scenes.png`.
"""

import json
import math
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minigpt4.evaluation import score_captions
from minigpt4.evaluation.report import Table, headline, scores_of
from minigpt4.mini.files import TRUTH_FILE
from minigpt4.mini.scenes import BACKGROUNDS, COLUMN, RELATIONS, ROW, THINGS

_NAMES = {word: thing.name for thing in THINGS for word in (thing.name, thing.plural)}
_NAMES |= {
    "cacti": "cactus",
    "flamingoes": "flamingo",
    "plane": "airplane",
    "planes": "airplane",
    "aircraft": "airplane",
}
_NAME = "|".join(sorted(map(re.escape, _NAMES), key=len, reverse=True))
_NAME_PATTERN = re.compile(rf"\b({_NAME})\b")
COLOUR_PATTERN = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b")
_RANKS = {ROW: ("left", "middle", "right"), COLUMN: ("top", "middle", "bottom")}
Pair = tuple[str, str]
COLUMNS = {
    "things_named": "things named",
    "things_wrong": "named, not there",
    "left_right": "left/right",
    "above_below": "above/below",
    "background": "background",
}
TEXT = """# The mini world

{table}

How true the captions are; the test scenes hold combinations that no training scene has:

{measures}
Does `{last}` look at the picture? CIDEr {cider:.3f}; with the images shuffled among the test scenes \
{shuffled:.3f}{less}.

- scenes with their captions: `{output}/scenes.png`
- metrics over epochs: `{evaluation}/metrics.png`; everything to look through: `{evaluation}/report.html`
- captions: `{evaluation}/captions_*.json`
- checkpoints: `{output}/stage1.pth`, `stage2.pth`, `flickr30k.pth`; logs: `{output}/logs`
- ask about a picture: `python demo.py --cfg-path eval_configs/mini_eval.yaml`, or in the terminal, with \
`--cli --image FILE`
"""
_SHOWN = 6
_TILE, _TEXT, _GAP, _LINE = 224, 150, 16, 15


# Whether captions are true: the scenes are drawn, so what they show is known exactly


@dataclass(frozen=True)
class Measures:
    """Shares, 0 to 1, over all captions of one checkpoint; NaN where no scene has anything of the kind."""

    things_named: float
    """Of the things that are there, those that the text names."""

    things_wrong: float
    """Of the things that the text names, those that are not there."""

    background: float
    """Of the texts, those that name the background's colour and no other."""

    left_right: float
    """Of the scenes in a row, those whose text says who is left of whom, all of it true."""

    above_below: float
    """The same for scenes in a column."""


def mentions(text: str) -> list[tuple[re.Match, str]]:
    """Where a text names kinds of things, and which (singular)."""
    return [(match, _NAMES[match.group()]) for match in _NAME_PATTERN.finditer(text.lower())]


def named_things(text: str) -> set[str]:
    """Names (singular) of the kinds of things that a text names."""
    return {kind for _, kind in mentions(text)}


def stated_order(text: str, layout: str) -> set[Pair]:
    """Pairs (first, second) that a text claims: first is left of (`row`) or above (`column`) second.

    Read from `A to the left of B to the left of C`, and from things that are said to be left, middle or right.
    """
    pairs: set[Pair] = set()
    for sentence in re.split(r"[.;]", text.lower()):
        if RELATIONS[layout] in sentence:
            pairs |= set(pairwise(_NAMES[word] for word in _NAME_PATTERN.findall(sentence)))
    ranks = _RANKS[layout]
    place = re.compile(rf"\b({_NAME}) (?:(?:on|in|at) the )?({'|'.join(ranks)})\b")
    placed = [(_NAMES[word], ranks.index(rank)) for word, rank in place.findall(text.lower())]
    pairs |= {(one, other) for one, first in placed for other, second in placed if first < second}
    return pairs


def measure(captions: Mapping[str, str], truth: Mapping[str, dict]) -> Measures:
    """Judge captions by image id against `scenes_test.json`; both must have the same ids."""
    if captions.keys() != truth.keys():
        raise ValueError(f"{len(captions)} captions for {len(truth)} scenes: the image ids must be the same")
    there, named, hits, colours = 0, 0, 0, []
    orders: dict[str, list[bool]] = {ROW: [], COLUMN: []}
    for image_id, scene in truth.items():
        text = captions[image_id]
        things = [group["thing"] for group in scene["groups"]]
        said = named_things(text)
        there, named, hits = there + len(things), named + len(said), hits + len(said & set(things))
        colours.append(set(COLOUR_PATTERN.findall(text.lower())) == {scene["background"]})
        if scene["layout"] in orders:
            true = {(one, other) for index, one in enumerate(things) for other in things[index + 1 :]}
            stated = stated_order(text, scene["layout"])
            orders[scene["layout"]].append(bool(stated) and stated <= true)
    return Measures(
        things_named=_share(hits, there),
        things_wrong=_share(named - hits, named),
        background=_share(sum(colours), len(colours)),
        left_right=_share(sum(orders[ROW]), len(orders[ROW])),
        above_below=_share(sum(orders[COLUMN]), len(orders[COLUMN])),
    )


def shuffled(captions: Mapping[str, str]) -> dict[str, str]:
    """Every image gets the caption of another one, as if the images had been shuffled.

    Raises ValueError for a single image.
    """
    if len(captions) < 2:
        raise ValueError("one image cannot be shuffled")
    ids = sorted(captions)
    half = len(ids) // 2
    return {image_id: captions[ids[(index + half) % len(ids)]] for index, image_id in enumerate(ids)}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


# The report


def lost(cider: float, cider_shuffled: float) -> float:
    """Share of the CIDEr that shuffling the images costs; NaN where the captions are no better than by chance."""
    return 1 - cider_shuffled / cider if cider > cider_shuffled else float("nan")


def write_report(output: Path, evaluation: Path, data: Path) -> None:
    """Read captions, metrics and truth; write the files of the report into `output`, `report.txt` last."""
    truth = json.loads((data / TRUTH_FILE).read_text(encoding="utf-8"))
    metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    captions = {}
    for one in metrics["checkpoints"]:
        entries = json.loads((evaluation / one["captions"]).read_text(encoding="utf-8"))
        captions[one["name"]] = {entry["image_id"]: entry["caption"] for entry in entries}
    measures = {name: measure(said, truth) for name, said in captions.items()}
    last = list(captions)[-1]
    records = json.loads((data / "flickr30k" / "flickr30k_grounded_detail_test.json").read_text(encoding="utf-8"))
    references = {record["image_id"]: [record["grounded_caption"]] for record in records}
    both = (captions[last], shuffled(captions[last]))
    cider, cider_shuffled = (score_captions(said, references)["CIDEr"] for said in both)
    share = lost(cider, cider_shuffled)
    draw_figure(output / "scenes.png", data / "flickr30k" / "flickr30k-images", captions[last])
    rows = [[name, *(percent(getattr(own, field)) for field in COLUMNS)] for name, own in measures.items()]
    text = TEXT.format(
        table=f"{headline(metrics)}\n\n{scores_of(metrics).markdown()}".strip(),
        measures=Table(["checkpoint", *COLUMNS.values()], rows).markdown(),
        last=last,
        cider=cider,
        shuffled=cider_shuffled,
        less=": no more than by chance" if math.isnan(share) else f", {percent(share)} less",
        output=output,
        evaluation=evaluation,
    )
    (output / "report.md").write_text(text, encoding="utf-8")
    content = {
        "measures": {name: asdict(own) for name, own in measures.items()},
        "looks": {"cider": cider, "cider_shuffled": cider_shuffled, "lost": share},
        "images": len(truth),
        "scores": {one["name"]: one["scores"] for one in metrics["checkpoints"]},
    }
    (output / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (output / "report.txt").write_text(text.replace("`", ""), encoding="utf-8")


def percent(share: float) -> str:
    """`95%`; `-` for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.0f}%"


def draw_figure(path: Path, images: Path, captions: dict[str, str]) -> None:
    """The first test scenes with what the model said about them, as PNG."""
    ids = sorted(captions)[:_SHOWN]
    columns = min(3, len(ids))
    rows = math.ceil(len(ids) / columns)
    figure = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, rows * (_TILE + _TEXT) + _GAP), "white")
    pen, font = ImageDraw.Draw(figure), ImageFont.load_default(size=12)
    for index, image_id in enumerate(ids):
        row, column = divmod(index, columns)
        left, top = _GAP + column * (_TILE + _GAP), _GAP + row * (_TILE + _TEXT)
        with Image.open(images / f"{image_id}.jpg") as scene:
            figure.paste(scene, (left, top))
        pen.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), outline="gray")
        for line, words in enumerate(textwrap.wrap(captions[image_id], 38)[:9]):
            pen.text((left, top + _TILE + 4 + line * _LINE), words, fill="black", font=font)
    figure.save(path)


if __name__ == "__main__":
    write_report(*map(Path, sys.argv[1:]))
