"""What a caption evaluation leaves in its folder: captions, scores as CSV, JSON and Markdown, a chart and a page.

No file holds a time or the number of processes: the same evaluation writes the same bytes.
"""

import base64
import csv
import html
import importlib.util
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.utils import as_json, refused, write_whole
from minigpt4.evaluation.bootstrap import DRAWS, Bootstrap
from minigpt4.evaluation.caption_data import CaptionItem, ReferenceMode
from minigpt4.evaluation.generate import NamedCheckpoint
from minigpt4.evaluation.metrics import CaptionScores
from minigpt4.processors import open_image

MODES = {
    "joined": "all captions of an image joined into one string, as in training",
    "separate": "every caption of an image is a reference",
}
CSV, JSON, MARKDOWN, CHART, PAGE = "metrics.csv", "metrics.json", "metrics.md", "metrics.png", "report.html"
TEMPLATE = Path(__file__).with_name("report_page.html")
MARK = re.compile("@([A-Z]+)@")
SETUP_KEYS = ("decoding", "prompt", "stop", "seed", "batch_size", "model", "versions")
GALLERY_METRICS = ("CIDEr", "ROUGE-L", "SPICE")
"""Those with a score for each image."""
MAX_IMAGES = 1000
THUMBNAIL = 208
"""Longer side, pixels."""

Scores = Mapping[str, float]
"""By metric, for one checkpoint."""


# Tables


@dataclass(frozen=True)
class Table:
    """A line of names and lines of cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As in the published table: `| checkpoint | BLEU-1 | ... |`."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)

    def html(self) -> str:
        """A `<table>`, its texts escaped."""
        tagged = [("th", self.head), *(("td", row) for row in self.rows)]
        lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) for tag, cells in tagged]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>\n"


def score_table(rows: Mapping[str, Scores], metrics: Sequence[str]) -> Table:
    """Four digits, a row a checkpoint."""
    found = [(name, [own.get(metric) for metric in metrics]) for name, own in rows.items()]
    cells = [[name, *("-" if value is None else f"{value:.4f}" for value in values)] for name, values in found]
    return Table(["checkpoint", *metrics], cells)


def interval_table(rows: Mapping[str, Mapping[str, Sequence[float]]], metrics: Sequence[str]) -> Table:
    """`0.3175 - 0.3302`, a row a checkpoint."""
    cells = [[name, *(f"{own[m][0]:.4f} - {own[m][1]:.4f}" for m in metrics)] for name, own in rows.items()]
    return Table(["checkpoint", *metrics], cells)


def difference_table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], metrics: Sequence[str]) -> Table:
    """`+0.0127 (p 0.002)`, a row a checkpoint."""
    cells = [
        [name, *(f"{own[m]['difference']:+.4f} (p {own[m]['p']:.3f})" for m in metrics)] for name, own in rows.items()
    ]
    return Table(["checkpoint", *metrics], cells)


def csv_table(rows: Mapping[str, Scores], metrics: Sequence[str], reference_mode: str, images: int) -> str:
    """All digits, with the reference mode and the number of images in every row."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["checkpoint", *metrics, "reference_mode", "images"])
    for name, scores in rows.items():
        writer.writerow([name, *(scores.get(metric, "") for metric in metrics), reference_mode, images])
    return file.getvalue()


# The page, with a gallery that can be searched


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
    """The images of the gallery: all, or the best and the worst by the last checkpoint, half of MAX_IMAGES each."""
    metrics = gallery_metrics(per_image[-1])
    chosen = list(range(len(items)))
    if len(items) > MAX_IMAGES:
        order = np.argsort(per_image[-1][metrics[0]], kind="stable") if metrics else np.arange(len(items))
        chosen = sorted(int(number) for number in (*order[: MAX_IMAGES // 2], *order[-(MAX_IMAGES // 2) :]))
    found = []
    for number in chosen:
        item = items[number]
        scores = [[round(float(own[metric][number]), 4) for own in per_image] for metric in metrics]
        said = [own[item.image_id] for own in captions]
        found.append(GalleryImage(item.image_id, thumbnail(item.file), list(references[item.image_id]), said, scores))
    return found


def gallery_metrics(names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Metrics by which single images can be ordered."""
    return [name for name in GALLERY_METRICS if name in names]


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
    results: Mapping[str, Any],
    tables: Mapping[str, Table],
    chart: bytes,
    images: Sequence[GalleryImage],
) -> str:
    """`report.html`, which needs no other file and no network: its policy forbids requests, its texts are escaped.

    `tables` are by heading, `results` the content of `metrics.json`, `chart` a PNG file.
    """
    notes = list(results["notes"])
    if len(images) < results["images"]:
        notes.append(f"The gallery shows {len(images):,} images, the best and the worst of the last checkpoint.")
    data = {
        "checkpoints": [one["name"] for one in results["checkpoints"]],
        "metrics": gallery_metrics(results["metrics"]),
        "images": [asdict(image) for image in images],
    }
    cards = [{key: one[key] for key in ("name", "file", "sha256", "card")} for one in results["checkpoints"]]
    fields = {
        "TITLE": html.escape(headline),
        "TABLES": "".join(f"<h2>{html.escape(name)}</h2>\n{table.html()}" for name, table in tables.items()),
        "CHART": _data_uri("image/png", chart),
        "NOTES": f"<ul>{''.join(f'<li>{html.escape(remark)}</li>' for remark in notes)}</ul>",
        "SETUP": html.escape(_pretty({key: results[key] for key in SETUP_KEYS if key in results})),
        "CARDS": html.escape(_pretty(cards)),
        "DATA": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),  # no text can end the script
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return MARK.sub(lambda mark: fields[mark[1]], template)  # one pass: marks in the data stay as they are


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# The chart


def require_figures(key: str) -> None:
    """ConfigError naming `key` unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f'{key}: the chart needs the package matplotlib; pip install -e ".[eval]" brings it')


def draw_metrics(path: Path, rows: Mapping[str, Scores], metrics: Sequence[str], title: str) -> None:
    """Write a PNG (1200 x 750 pixels) with a line for each metric and a place for each checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    places = range(len(rows))
    for metric in metrics:
        axes.plot(places, [scores.get(metric) for scores in rows.values()], marker="o", label=metric)
    axes.set_xticks(list(places), list(rows), rotation=20 if len(rows) > 6 else 0)
    axes.set_ylabel("score")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})  # the same numbers give the same bytes
    pyplot.close(figure)


# The report


@dataclass(frozen=True)
class ScoredCheckpoint:
    """One row of the tables."""

    checkpoint: NamedCheckpoint
    captions: Mapping[str, str]
    """By image id, in the order of the data."""

    scores: CaptionScores

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return self.checkpoint.name

    @property
    def captions_file(self) -> str:
        """Name of the file in COCO's results form."""
        return f"captions_{self.checkpoint.file_name}.json"

    @property
    def empty_captions(self) -> int:
        """How many captions have no word."""
        return sum(not text.strip() for text in self.captions.values())


@dataclass(frozen=True)
class CaptionReport:
    """Everything that is reported of an evaluation."""

    title: str
    key: str
    """Hash of everything that the report depends on."""

    items: Sequence[CaptionItem]
    references: Mapping[str, Sequence[str]]
    reference_mode: ReferenceMode
    metrics: Sequence[str]
    rows: Sequence[ScoredCheckpoint]
    setup: Mapping[str, Any]
    """Decoding, prompt, versions and so on: the same for all checkpoints."""

    notes: Sequence[str]

    def write(self, folder: Path) -> None:
        """Write every file, `metrics.json` last; ConfigError if the disk refuses."""
        for row in self.rows:
            results = [{"image_id": image_id, "caption": text} for image_id, text in row.captions.items()]
            write_whole(folder / row.captions_file, as_json(results))
        write_whole(folder / CSV, csv_table(self.scores, self.metrics, self.reference_mode, len(self.items)))
        write_whole(folder / MARKDOWN, self.markdown())
        title = headline(self.results)
        try:
            draw_metrics(folder / CHART, self.scores, self.metrics, title)
        except OSError as error:
            raise refused(folder / CHART, error, "--save_path") from error
        captions, per_image = [row.captions for row in self.rows], [row.scores.per_image for row in self.rows]
        images = gallery(self.items, self.references, captions, per_image)
        chart = (folder / CHART).read_bytes()
        write_whole(folder / PAGE, page(title, self.results, self.tables, chart, images))
        write_whole(folder / JSON, as_json(self.results))

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Corpus scores by the checkpoint's name."""
        return {row.name: row.scores.corpus for row in self.rows}

    @cached_property
    def _bootstrap(self) -> Bootstrap | None:
        images = len(self.items)
        return Bootstrap([row.scores for row in self.rows], images) if images > 1 else None

    @cached_property
    def results(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        return {
            "key": self.key,
            "data": self.title,
            "images": len(self.items),
            "reference_mode": self.reference_mode,
            "metrics": list(self.metrics),
            **self.setup,
            "notes": self.remarks,
            "checkpoints": [
                {
                    "name": row.name,
                    "file": str(row.checkpoint.path),
                    "sha256": row.checkpoint.sha256,
                    "captions": row.captions_file,
                    "empty_captions": row.empty_captions,
                    "mean_words": sum(len(text.split()) for text in row.captions.values()) / len(row.captions),
                    "scores": row.scores.corpus,
                    "intervals": self._bootstrap.intervals(index) if self._bootstrap else {},
                    "card": row.checkpoint.card,
                }
                for index, row in enumerate(self.rows)
            ],
            "comparisons": self._comparisons(),
        }

    def _comparisons(self) -> list[dict[str, Any]]:
        """Every checkpoint against every one above it."""
        if self._bootstrap is None:
            return []
        return [
            {
                "checkpoint": row.name,
                "baseline": self.rows[base].name,
                "metrics": {name: asdict(one) for name, one in self._bootstrap.compare(index, base).items()},
            }
            for index, row in enumerate(self.rows)
            for base in range(index)
        ]

    @property
    def remarks(self) -> list[str]:
        """What a reader has to know about the numbers."""
        remarks = [f"References: {self.reference_mode} ({MODES[self.reference_mode]})."]
        if self._bootstrap is None:
            remarks.append("One image: no intervals, and CIDEr is 0, for no word tells it from other images.")
        else:
            remarks.append(f"Intervals: 95%, {DRAWS:,} bootstrap draws of images; p: paired over the same draws.")
        empty = [f"{row.name} {count}" for row in self.rows if (count := row.empty_captions)]
        if empty:
            remarks.append(f"Empty captions, which count as they are: {', '.join(empty)}.")
        return [*remarks, *self.notes]

    @property
    def tables(self) -> dict[str, Table]:
        """By heading."""
        found = {"Scores": score_table(self.scores, self.metrics)}
        checkpoints = self.results["checkpoints"]
        if self._bootstrap is not None:
            found["95% intervals"] = interval_table({c["name"]: c["intervals"] for c in checkpoints}, self.metrics)
        against_first = [c for c in self.results["comparisons"] if c["baseline"] == self.rows[0].name]
        if against_first:
            heading = f"Difference from {self.rows[0].name}, and p of the paired test"
            found[heading] = difference_table({c["checkpoint"]: c["metrics"] for c in against_first}, self.metrics)
        return found

    def markdown(self) -> str:
        """The content of `metrics.md`."""
        decoding = ", ".join(f"{key} {value}" for key, value in self.setup["decoding"].items())
        lines = [*self.remarks, f"Decoding, the same for all checkpoints: {decoding}."]
        lines += [f"Prompt: `{self.setup['prompt']}`", f"Stop: `{self.setup['stop']}`"]
        (scores, *more) = self.tables.items()
        parts = [f"# {headline(self.results)}", scores[1].markdown(), "\n".join(f"- {line}" for line in lines)]
        parts += [f"## {heading}\n\n{table.markdown()}" for heading, table in more]
        return "\n\n".join(part.strip() for part in [*parts, f"![metrics]({CHART})"]) + "\n"


def headline(results: Mapping[str, Any]) -> str:
    """What was scored against what."""
    return f"{results['data']}: {results['images']} images, references {results['reference_mode']}"


def summary(results: Mapping[str, Any]) -> str:
    """What the terminal shows of `metrics.json`: the table in the published layout."""
    scores = {one["name"]: one["scores"] for one in results["checkpoints"]}
    return "\n".join([headline(results), "", score_table(scores, results["metrics"]).markdown()])


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The results of a report with this key, if all its files are there."""
    try:
        results = json.loads((folder / JSON).read_text(encoding="utf-8"))
        names = [CSV, MARKDOWN, CHART, PAGE, *(one["captions"] for one in results["checkpoints"])]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return results if results.get("key") == key and all((folder / name).is_file() for name in names) else None
