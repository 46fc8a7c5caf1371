"""Scores as tables: the published layout for terminals, Markdown and HTML, and CSV."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Scores = Mapping[str, float]
"""By metric, for one checkpoint."""


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
        lines = [_html_line("th", self.head), *(_html_line("td", row) for row in self.rows)]
        return f"<table>{''.join(lines)}</table>\n"


def score_table(rows: Mapping[str, Scores], metrics: Sequence[str]) -> Table:
    """Four digits, a row a checkpoint."""
    return Table(
        ["checkpoint", *metrics], [[name, *(_number(own.get(m)) for m in metrics)] for name, own in rows.items()]
    )


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


def _html_line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
