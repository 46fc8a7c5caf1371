"""What a caption evaluation leaves in its folder: captions, scores as CSV, JSON and Markdown, and a chart.

No file holds a time or the number of processes: the same evaluation writes the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.evaluation.caption_data import ReferenceMode
from minigpt4.evaluation.caption_metrics import CaptionScores
from minigpt4.evaluation.checkpoint_list import NamedCheckpoint
from minigpt4.evaluation.figure import draw_metrics
from minigpt4.evaluation.tables import csv_table, markdown_table

MODES = {
    "joined": "all captions of an image joined into one string, as in training",
    "separate": "every caption of an image is a reference",
}


@dataclass(frozen=True)
class ScoredCheckpoint:
    """One row of the tables."""

    checkpoint: NamedCheckpoint
    captions: Mapping[str, str]
    """By image id, in the order of the data."""

    scores: CaptionScores

    @property
    def captions_file(self) -> str:
        """Name of the file in COCO's results form."""
        return f"captions_{self.checkpoint.file_name}.json"


@dataclass(frozen=True)
class CaptionReport:
    """Everything that is reported of an evaluation."""

    title: str
    images: int
    reference_mode: ReferenceMode
    metrics: Sequence[str]
    rows: Sequence[ScoredCheckpoint]
    setup: Mapping[str, Any]
    """Decoding, prompt, versions and so on: the same for all checkpoints."""

    notes: Sequence[str] = ()

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Corpus scores by the checkpoint's name."""
        return {row.checkpoint.name: row.scores.corpus for row in self.rows}

    @property
    def headline(self) -> str:
        """What was scored against what."""
        return f"{self.title}: {self.images} images, references {self.reference_mode}"

    @property
    def table(self) -> str:
        """Scores in the published layout."""
        return markdown_table(self.scores, self.metrics)

    def write(self, folder: Path) -> None:
        """Write every file; ConfigError if the disk refuses."""
        for row in self.rows:
            results = [{"image_id": image_id, "caption": text} for image_id, text in row.captions.items()]
            _write(folder / row.captions_file, _json(results))
        mode = self.reference_mode
        _write(folder / "metrics.csv", csv_table(self.scores, self.metrics, mode, self.images))
        _write(folder / "metrics.json", _json(self.facts()))
        _write(folder / "metrics.md", self.markdown())
        try:
            draw_metrics(folder / "metrics.png", self.scores, self.metrics, self.headline)
        except OSError as error:
            raise _refused(folder / "metrics.png", error) from error

    def facts(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        return {
            "data": self.title,
            "images": self.images,
            "reference_mode": self.reference_mode,
            "metrics": list(self.metrics),
            **self.setup,
            "notes": list(self.notes),
            "checkpoints": [
                {
                    "name": row.checkpoint.name,
                    "file": str(row.checkpoint.path),
                    "sha256": row.checkpoint.sha256,
                    "captions": row.captions_file,
                    "scores": row.scores.corpus,
                    "card": row.checkpoint.card,
                }
                for row in self.rows
            ],
        }

    def markdown(self) -> str:
        """The content of `metrics.md`."""
        decoding = ", ".join(f"{key} {value}" for key, value in self.setup["decoding"].items())
        facts = [
            f"References: {self.reference_mode} ({MODES[self.reference_mode]}).",
            f"Decoding, the same for all checkpoints: {decoding}.",
            f"Prompt: `{self.setup['prompt']}`",
            *self.notes,
        ]
        lines = "".join(f"- {fact}\n" for fact in facts)
        return f"# {self.headline}\n\n{self.table}\n{lines}\n![metrics](metrics.png)\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--save_path: cannot write {path}: {error.strerror}")
