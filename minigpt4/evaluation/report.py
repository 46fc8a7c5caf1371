"""What a caption evaluation leaves in its folder: captions, scores as CSV, JSON and Markdown, a chart and a page.

No file holds a time or the number of processes: the same evaluation writes the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minigpt4.common.output_files import as_json, refused, write_whole
from minigpt4.evaluation.caption_data import CaptionItem, ReferenceMode
from minigpt4.evaluation.caption_metrics import CaptionScores
from minigpt4.evaluation.checkpoint_list import NamedCheckpoint
from minigpt4.evaluation.figure import draw_metrics
from minigpt4.evaluation.report_page import GalleryImage, gallery, page
from minigpt4.evaluation.resampling import DRAWS, Bootstrap
from minigpt4.evaluation.tables import Table, csv_table, difference_table, interval_table, score_table

MODES = {
    "joined": "all captions of an image joined into one string, as in training",
    "separate": "every caption of an image is a reference",
}
CSV, JSON, MARKDOWN, CHART, PAGE = "metrics.csv", "metrics.json", "metrics.md", "metrics.png", "report.html"


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
        try:
            draw_metrics(folder / CHART, self.scores, self.metrics, headline(self.facts))
        except OSError as error:
            raise refused(folder / CHART, error, "--save_path") from error
        chart = (folder / CHART).read_bytes()
        write_whole(folder / PAGE, page(headline(self.facts), self.facts, self.tables, chart, self._gallery()))
        write_whole(folder / JSON, as_json(self.facts))

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Corpus scores by the checkpoint's name."""
        return {row.name: row.scores.corpus for row in self.rows}

    @cached_property
    def _bootstrap(self) -> Bootstrap | None:
        images = len(self.items)
        return Bootstrap([row.scores for row in self.rows], images) if images > 1 else None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        return {
            "key": self.key,
            "data": self.title,
            "images": len(self.items),
            "reference_mode": self.reference_mode,
            "metrics": list(self.metrics),
            **self.setup,
            "notes": self.remarks,
            "checkpoints": [self._row_facts(index) for index in range(len(self.rows))],
            "comparisons": self._comparisons(),
        }

    def _row_facts(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {
            "name": row.name,
            "file": str(row.checkpoint.path),
            "sha256": row.checkpoint.sha256,
            "captions": row.captions_file,
            "empty_captions": _empty(row),
            "mean_words": sum(len(text.split()) for text in row.captions.values()) / len(row.captions),
            "scores": row.scores.corpus,
            "intervals": self._bootstrap.intervals(index) if self._bootstrap else {},
            "card": row.checkpoint.card,
        }

    def _comparisons(self) -> list[dict[str, Any]]:
        """Every checkpoint against every one above it."""
        if self._bootstrap is None:
            return []
        pairs = [(index, base) for index in range(len(self.rows)) for base in range(index)]
        return [
            {
                "checkpoint": self.rows[index].name,
                "baseline": self.rows[base].name,
                "metrics": {name: asdict(one) for name, one in self._bootstrap.compare(index, base).items()},
            }
            for index, base in pairs
        ]

    @property
    def remarks(self) -> list[str]:
        """What a reader has to know about the numbers."""
        remarks = [f"References: {self.reference_mode} ({MODES[self.reference_mode]})."]
        if self._bootstrap is None:
            remarks.append("One image: no intervals, and CIDEr is 0, for no word tells it from other images.")
        else:
            remarks.append(f"Intervals: 95%, {DRAWS:,} bootstrap draws of images; p: paired over the same draws.")
        empty = [f"{row.name} {count}" for row in self.rows if (count := _empty(row))]
        if empty:
            remarks.append(f"Empty captions, which count as they are: {', '.join(empty)}.")
        return [*remarks, *self.notes]

    @property
    def tables(self) -> dict[str, Table]:
        """By heading."""
        found = {"Scores": score_table(self.scores, self.metrics)}
        checkpoints = self.facts["checkpoints"]
        if self._bootstrap is not None:
            found["95% intervals"] = interval_table({c["name"]: c["intervals"] for c in checkpoints}, self.metrics)
        against_first = [c for c in self.facts["comparisons"] if c["baseline"] == self.rows[0].name]
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
        parts = [f"# {headline(self.facts)}", scores[1].markdown(), "\n".join(f"- {line}" for line in lines)]
        parts += [f"## {heading}\n\n{table.markdown()}" for heading, table in more]
        return "\n\n".join(part.strip() for part in [*parts, f"![metrics]({CHART})"]) + "\n"

    def _gallery(self) -> list[GalleryImage]:
        return gallery(
            self.items,
            self.references,
            [row.captions for row in self.rows],
            [row.scores.per_image for row in self.rows],
        )


def headline(facts: Mapping[str, Any]) -> str:
    """What was scored against what."""
    return f"{facts['data']}: {facts['images']} images, references {facts['reference_mode']}"


def summary(facts: Mapping[str, Any]) -> str:
    """What the terminal shows of `metrics.json`: the table in the published layout."""
    scores = {one["name"]: one["scores"] for one in facts["checkpoints"]}
    return "\n".join([headline(facts), "", score_table(scores, facts["metrics"]).markdown()])


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The facts of a report with this key, if all its files are there."""
    try:
        facts = json.loads((folder / JSON).read_text(encoding="utf-8"))
        names = [CSV, MARKDOWN, CHART, PAGE, *(one["captions"] for one in facts["checkpoints"])]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if facts.get("key") == key and all((folder / name).is_file() for name in names) else None


def _empty(row: ScoredCheckpoint) -> int:
    return sum(not text.strip() for text in row.captions.values())
