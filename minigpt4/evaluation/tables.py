"""Scores as tables: the published layout for terminals and Markdown, and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

Scores = Mapping[str, float]
"""By metric, for one checkpoint."""


def markdown_table(rows: Mapping[str, Scores], metrics: Sequence[str]) -> str:
    """`| checkpoint | BLEU-1 | ... |`, four digits, a row a checkpoint."""
    lines = [["checkpoint", *metrics], ["---"] * (1 + len(metrics))]
    lines += [[name.replace("|", "\\|"), *(_number(scores.get(m)) for m in metrics)] for name, scores in rows.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def csv_table(rows: Mapping[str, Scores], metrics: Sequence[str], reference_mode: str, images: int) -> str:
    """All digits, with the reference mode and the number of images in every row."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["checkpoint", *metrics, "reference_mode", "images"])
    for name, scores in rows.items():
        writer.writerow([name, *(scores.get(metric, "") for metric in metrics), reference_mode, images])
    return file.getvalue()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
