"""`report.html`: one page that needs no other file and no network, with a gallery that can be searched.

The page's policy forbids requests, its texts are escaped, and pictures are in it as small JPEGs.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.errors import SampleError
from minigpt4.evaluation.caption_data import CaptionItem
from minigpt4.evaluation.tables import Table
from minigpt4.processors import open_image

MARK = re.compile("@([A-Z]+)@")
TEMPLATE = Path(__file__).with_name("report_page.html")
SETUP_KEYS = ("decoding", "prompt", "stop", "seed", "batch_size", "model", "versions")
GALLERY_METRICS = ("CIDEr", "ROUGE-L", "SPICE")
"""Those with a score for each image."""
MAX_IMAGES = 1000
THUMBNAIL = 208
"""Longer side, pixels."""


@dataclass(frozen=True)
class GalleryImage:
    """One image of the gallery."""

    id: str
    picture: str
    """`data:` URI, or empty if the file cannot be read any more."""

    references: Sequence[str]
    captions: Sequence[str]
    """By checkpoint."""

    scores: Sequence[Sequence[float]]
    """By metric of `gallery_metrics`, then by checkpoint."""


def gallery(
    items: Sequence[CaptionItem],
    references: Mapping[str, Sequence[str]],
    captions: Sequence[Mapping[str, str]],
    per_image: Sequence[Mapping[str, np.ndarray]],
) -> list[GalleryImage]:
    """The images of the gallery: all, or the best and worst half each of MAX_IMAGES by the last checkpoint."""
    metrics = gallery_metrics(per_image[-1])
    found = []
    for number in _selection(per_image[-1][metrics[0]] if metrics else None, len(items)):
        item = items[number]
        scores = [[round(float(own[metric][number]), 4) for own in per_image] for metric in metrics]
        said = [own[item.image_id] for own in captions]
        found.append(GalleryImage(item.image_id, thumbnail(item.file), list(references[item.image_id]), said, scores))
    return found


def gallery_metrics(names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Metrics by which single images can be ordered."""
    return [name for name in GALLERY_METRICS if name in names]


def _selection(scores_N: np.ndarray | None, images: int) -> list[int]:
    if images <= MAX_IMAGES:
        return list(range(images))
    order = np.arange(images) if scores_N is None else np.argsort(scores_N, kind="stable")
    return sorted(int(number) for number in (*order[: MAX_IMAGES // 2], *order[-(MAX_IMAGES // 2) :]))


def thumbnail(file: Path) -> str:
    """A small JPEG of an image file as a `data:` URI."""
    try:
        image = open_image(file)
    except SampleError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return _data_uri("image/jpeg", buffer.getvalue())


def page(
    headline: str,
    facts: Mapping[str, Any],
    tables: Mapping[str, Table],
    chart: bytes,
    images: Sequence[GalleryImage],
) -> str:
    """The page; `tables` are by heading, `facts` the content of `metrics.json`."""
    notes = list(facts["notes"])
    if len(images) < facts["images"]:
        notes.append(f"The gallery shows {len(images):,} images, the best and the worst of the last checkpoint.")
    data = {
        "checkpoints": [one["name"] for one in facts["checkpoints"]],
        "metrics": gallery_metrics(facts["metrics"]),
        "images": [asdict(image) for image in images],
    }
    cards = [{key: one[key] for key in ("name", "file", "sha256", "card")} for one in facts["checkpoints"]]
    fields = {
        "TITLE": html.escape(headline),
        "TABLES": "".join(f"<h2>{html.escape(name)}</h2>\n{table.html()}" for name, table in tables.items()),
        "CHART": _data_uri("image/png", chart),
        "FACTS": f"<ul>{''.join(f'<li>{html.escape(remark)}</li>' for remark in notes)}</ul>",
        "SETUP": html.escape(_pretty({key: facts[key] for key in SETUP_KEYS if key in facts})),
        "CARDS": html.escape(_pretty(cards)),
        "DATA": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),  # no text can end the script
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return MARK.sub(lambda mark: fields[mark[1]], template)  # one pass: marks in the data stay as they are


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
