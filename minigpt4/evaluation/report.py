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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.utils import as_json, escaped, refused, write_whole
from minigpt4.evaluation.bootstrap import DRAWS, Bootstrap
from minigpt4.evaluation.caption_data import CaptionData, CaptionItem, ReferenceMode
from minigpt4.evaluation.generate import NamedCheckpoint, decoding_line
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
GALLERY_METRICS = ("CIDEr", "ROUGE-L")
"""Those with a score for each image."""
MAX_IMAGES = 1000
THUMBNAIL = 208
"""Longer side, pixels."""


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


def document(title: str, table: Table, notes: Sequence[str], sections: Sequence[str]) -> str:
    """A report in Markdown."""
    parts = [f"# {title}", table.markdown(), "\n".join(f"- {line}" for line in notes), *sections]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def score_table(rows: Mapping[str, Mapping[str, float | None]], metrics: Sequence[str]) -> Table:
    """Scores by checkpoint and metric, with four digits."""
    cells = [[name, *(four_digits(own.get(metric)) for metric in metrics)] for name, own in rows.items()]
    return Table(["checkpoint", *metrics], cells)


def four_digits(score: float | None, interval: Sequence[float] | None = None) -> str:
    """`0.1234`, or with its interval `0.1234 (95% 0.1000 - 0.1500)`; `-` for no score."""
    ends = f" (95% {interval[0]:.4f} - {interval[1]:.4f})" if interval else ""
    return "-" if score is None else f"{score:.4f}{ends}"


def _tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Scores, intervals and differences from the first checkpoint, by heading."""
    checkpoints, metrics = results["checkpoints"], results["metrics"]
    head, first = ["checkpoint", *metrics], checkpoints[0]["name"]
    intervals, differences = [], []
    for one in [one for one in checkpoints if one["intervals"]]:
        ends = [one["intervals"][metric] for metric in metrics]
        intervals.append([one["name"], *(f"{low:.4f} - {high:.4f}" for low, high in ends)])
    for one in [one for one in results["comparisons"] if one["baseline"] == first]:
        compared = [one["metrics"][metric] for metric in metrics]
        differences.append([one["checkpoint"], *(f"{own['difference']:+.4f} (p {own['p']:.3f})" for own in compared)])
    found = {
        "Scores": score_table(_scores(results), metrics),
        "95% intervals": Table(head, intervals),
        f"Difference from {first}, and p of the paired test": Table(head, differences),
    }
    return {heading: table for heading, table in found.items() if table.rows}


def _scores(results: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {one["name"]: one["scores"] for one in results["checkpoints"]}


def _csv(results: Mapping[str, Any]) -> str:
    """All digits, with the reference mode and the number of images in every row."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["checkpoint", *results["metrics"], "reference_mode", "images"])
    for name, scores in _scores(results).items():
        values = [scores.get(metric, "") for metric in results["metrics"]]
        writer.writerow([name, *values, results["reference_mode"], results["images"]])
    return file.getvalue()


# The page, with a gallery that can be searched


def gallery(
    items: Sequence[CaptionItem],
    references: Mapping[str, Sequence[str]],
    captions: Sequence[Mapping[str, str]],
    per_image: Sequence[Mapping[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """The images of the gallery: all, or the best and the worst by the last checkpoint, half of MAX_IMAGES each.

    Captions are by checkpoint, scores by metric of `gallery_metrics` and then by checkpoint.
    """
    metrics = gallery_metrics(per_image[-1])
    chosen = list(range(len(items)))
    if len(items) > MAX_IMAGES:
        order = np.argsort(per_image[-1][metrics[0]], kind="stable") if metrics else np.arange(len(items))
        chosen = sorted(int(number) for number in (*order[: MAX_IMAGES // 2], *order[-(MAX_IMAGES // 2) :]))
    return [
        {
            "id": item.image_id,
            "picture": thumbnail(item.file),
            "references": list(references[item.image_id]),
            "captions": [own[item.image_id] for own in captions],
            "scores": [[round(float(own[metric][number]), 4) for own in per_image] for metric in metrics],
        }
        for number, item in [(number, items[number]) for number in chosen]
    ]


def gallery_metrics(names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Metrics by which single images can be ordered."""
    return [name for name in GALLERY_METRICS if name in names]


def thumbnail(file: Path, side: int = THUMBNAIL) -> str:
    """A JPEG, at most `side` pixels a side, of an image file as a `data:` URI; empty if it cannot be read any more."""
    try:
        image = open_image(file)
    except SampleError:
        return ""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return _data_uri("image/jpeg", buffer.getvalue())


def page(
    headline: str,
    results: Mapping[str, Any],
    tables: Mapping[str, Table],
    chart: bytes,
    images: Sequence[Mapping[str, Any]],
) -> str:
    """`report.html`, which needs no other file and no network: its policy forbids requests, its texts are escaped.

    `results` are the content of `metrics.json`, `tables` by heading, `chart` a PNG file.
    """
    notes = list(results["notes"])
    if len(images) < results["images"]:
        notes.append(f"The gallery shows {len(images):,} images, the best and the worst of the last checkpoint.")
    data = {
        "checkpoints": [one["name"] for one in results["checkpoints"]],
        "metrics": gallery_metrics(results["metrics"]),
        "images": list(images),
    }
    cards = [{key: one[key] for key in ("name", "file", "sha256", "card")} for one in results["checkpoints"]]
    fields = {
        "TITLE": html.escape(headline),
        "TABLES": "".join(f"<h2>{html.escape(name)}</h2>\n{table.html()}" for name, table in tables.items()),
        "CHART": _data_uri("image/png", chart),
        "NOTES": f"<ul>{''.join(f'<li>{html.escape(remark)}</li>' for remark in notes)}</ul>",
        "SETUP": html.escape(_pretty({key: results[key] for key in SETUP_KEYS if key in results})),
        "CARDS": html.escape(_pretty(cards)),
    }
    return filled(TEMPLATE, fields, data)


def filled(template: Path, fields: Mapping[str, str], data: Any) -> str:
    """A page from its template: escaped `fields` by name in place of `@NAME@`, `data` as JSON in place of `@DATA@`."""
    script = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script
    values = {**fields, "DATA": escaped(script)}
    # one pass: marks in the data stay as they are
    return MARK.sub(lambda mark: values[mark[1]], template.read_text(encoding="utf-8"))


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# The chart


BLUE, ORANGE = "#0072B2", "#E69F00"
"""Of Okabe and Ito's palette, which colour-blind people can tell apart."""


def require_figures(key: str) -> None:
    """ConfigError naming `key` unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f'{key}: the chart needs the package matplotlib; pip install -e ".[eval]" brings it')


def _draw_metrics(path: Path, results: Mapping[str, Any]) -> None:
    """Write a PNG (1200 x 750 pixels): a panel for each metric, in it each checkpoint with its 95% interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics, checkpoints = results["metrics"], results["checkpoints"]
    names, places = [one["name"] for one in checkpoints], list(range(len(checkpoints)))
    columns = -(-len(metrics) // 2)
    shape = (-(-len(metrics) // columns), columns)
    figure, panels = pyplot.subplots(*shape, figsize=(8, 5), dpi=150, sharex=True, squeeze=False)
    for panel in panels.flat[len(metrics) :]:
        panel.set_visible(False)
    for metric, panel in zip(metrics, panels.flat, strict=False):
        scores = [one["scores"].get(metric) for one in checkpoints]
        panel.plot(places, scores, marker="o", markersize=4, color=BLUE)
        for place, one in enumerate(checkpoints):
            if one["intervals"]:
                panel.vlines(place, *one["intervals"][metric], color=ORANGE, linewidth=2)
        panel.set_title(metric, fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xticks(places, names, rotation=60, ha="right", fontsize=7)
        panel.tick_params(axis="y", labelsize=7)
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
    figure.suptitle(f"{headline(results)}; bars: 95% intervals", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})  # the same numbers give the same bytes
    pyplot.close(figure)


# The report


def write_report(
    folder: Path,
    data: CaptionData,
    reference_mode: ReferenceMode,
    metrics: Sequence[str],
    rows: Sequence[tuple[NamedCheckpoint, Mapping[str, str], CaptionScores]],
    setup: Mapping[str, Any],
) -> dict[str, Any]:
    """Write every file, `metrics.json`, whose content is returned, last; ConfigError if the disk refuses.

    Args:
        rows: of each checkpoint its captions, by image id in the order of the data, and their scores.
        setup: decoding, prompt, versions and so on: the same for all checkpoints.
    """
    bootstrap = Bootstrap([scores for _, _, scores in rows], len(data)) if len(data) > 1 else None
    checkpoints, comparisons = [], []
    for index, (one, captions, scores) in enumerate(rows):
        content = {
            **one.identity,
            "captions": f"captions_{one.file_name}.json",
            "empty_captions": sum(not text.strip() for text in captions.values()),
            "mean_words": sum(len(text.split()) for text in captions.values()) / len(captions),
            "scores": scores.corpus,
            "intervals": bootstrap.intervals(index) if bootstrap else {},
            "card": one.card,
        }
        checkpoints.append(content)
        said = [{"image_id": image_id, "caption": text} for image_id, text in captions.items()]
        write_whole(folder / content["captions"], as_json(said))
        for base in range(index if bootstrap else 0):  # against every one above it
            compared = {"checkpoint": one.name, "baseline": rows[base][0].name}
            comparisons.append(compared | {"metrics": bootstrap.compare(index, base)})
    results = {
        "data": f"{data.dataset.name}, {data.dataset.split}",
        "images": len(data),
        "reference_mode": reference_mode,
        "metrics": list(metrics),
        **setup,
        "notes": _notes(reference_mode, bootstrap is not None, checkpoints),
        "checkpoints": checkpoints,
        "comparisons": comparisons,
    }
    write_whole(folder / CSV, _csv(results))
    write_whole(folder / MARKDOWN, _markdown(results))
    try:
        _draw_metrics(folder / CHART, results)
    except OSError as error:
        raise refused(folder / CHART, error, "--save_path") from error
    all_captions, per_image = [captions for _, captions, _ in rows], [scores.per_image for _, _, scores in rows]
    images = gallery(data.items, data.references(reference_mode), all_captions, per_image)
    chart = (folder / CHART).read_bytes()
    write_whole(folder / PAGE, page(headline(results), results, _tables(results), chart, images))
    write_whole(folder / JSON, as_json(results))
    return results


def _notes(reference_mode: ReferenceMode, has_intervals: bool, checkpoints: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know about the numbers."""
    notes = [f"References: {reference_mode} ({MODES[reference_mode]})."]
    if has_intervals:
        notes.append(f"Intervals: 95%, {DRAWS:,} bootstrap draws of images; p: paired over the same draws.")
    else:
        notes.append("One image: no intervals, and CIDEr is 0, for no word tells it from other images.")
    empty = [f"{one['name']} {one['empty_captions']}" for one in checkpoints if one["empty_captions"]]
    if empty:
        notes.append(f"Empty captions, which count as they are: {', '.join(empty)}.")
    return notes


def _markdown(results: Mapping[str, Any]) -> str:
    """The content of `metrics.md`."""
    lines = [*results["notes"], decoding_line(results)]
    lines += [f"Prompt: `{results['prompt']}`", f"Stop: `{results['stop']}`"]
    ((_, scores), *more) = _tables(results).items()
    sections = [f"## {heading}\n\n{table.markdown()}" for heading, table in more]
    return document(headline(results), scores, lines, [*sections, f"![metrics]({CHART})"])


def headline(results: Mapping[str, Any]) -> str:
    """What was scored against what."""
    return f"{results['data']}: {results['images']} images, references {results['reference_mode']}"


def summary(results: Mapping[str, Any]) -> str:
    """What the terminal shows of `metrics.json`: the table in the published layout."""
    return "\n".join([headline(results), "", score_table(_scores(results), results["metrics"]).markdown()])
