"""What reports are made of: tables, pages and figures. No file holds a time: the same results write the same bytes."""

import base64
import csv
import html
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import escaped, refused

FRAME, SCRIPT = (Path(__file__).with_name(name) for name in ("page.html", "page_script.html"))
MARK = re.compile("@([A-Z]+)@")
THUMBNAIL = 208
"""Longer side, pixels."""


@dataclass(frozen=True)
class Table:
    """A line of names and lines of cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """As in the published table: `| checkpoint | BLEU-1 | ... |`."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)

    def html(self) -> str:
        """A `<table>`, its texts escaped."""
        tagged = [("th", self.head), *(("td", row) for row in self.rows)]
        lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) for tag, cells in tagged]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>\n"

    def csv(self) -> str:
        """Numbers may be cells, and have all their digits."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.head, *self.rows])
        return file.getvalue()


def document(title: str, table: Table, notes: Sequence[str], sections: Sequence[str]) -> str:
    """A report in Markdown."""
    parts = [f"# {title}", table.markdown(), "\n".join(f"- {line}" for line in notes), *sections]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def under_headings(tables: Mapping[str, Table]) -> list[str]:
    """Sections of a `document`."""
    return [f"## {heading}\n\n{table.markdown()}" for heading, table in tables.items()]


def score_table(rows: Mapping[str, Mapping[str, float | None]], metrics: Sequence[str]) -> Table:
    """Scores by checkpoint and metric, with four digits."""
    cells = [[name, *(four_digits(own.get(metric)) for metric in metrics)] for name, own in rows.items()]
    return Table(["checkpoint", *metrics], cells)


def headline(results: Mapping[str, Any]) -> str:
    """What was scored against what, of the content of an evaluation's `metrics.json`."""
    return f"{results['data']}: {results['images']} images, references {results['reference_mode']}"


def scores_of(results: Mapping[str, Any]) -> Table:
    """The table in the published layout, of the content of `metrics.json`."""
    return score_table({one["name"]: one["scores"] for one in results["checkpoints"]}, results["metrics"])


def four_digits(score: float | None, interval: Sequence[float] | None = None) -> str:
    """`0.1234`, or with its interval `0.1234 (95% 0.1000 - 0.1500)`; `-` for no score."""
    ends = f" (95% {interval[0]:.4f} - {interval[1]:.4f})" if interval else ""
    return "-" if score is None else f"{score:.4f}{ends}"


def with_intervals(name: str, cells: Sequence[str], intervals: Sequence[Sequence[str] | None]) -> list[list[str]]:
    """A row of a table, and below it two of its 95% intervals."""
    lows, highs = zip(*(ends or ("-", "-") for ends in intervals), strict=True)
    return [[name, *cells], ["95% low", *lows], ["95% high", *highs]]


# Pages


def page(title: str, body: str, data: Any = None) -> str:
    """A page that needs no other file and no network: its policy forbids requests. `body`: HTML, whose scripts find
    `data` and the functions of `page_script.html`; without data none may run."""
    fields = {"TITLE": html.escape(title), "BODY": body, "POLICY": "", "SCRIPT": ""}
    if data is not None:
        text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script
        fields |= {"POLICY": "; script-src 'unsafe-inline'", "SCRIPT": filled(SCRIPT, {"DATA": text})}
    return escaped(filled(FRAME, fields))


def filled(template: Path, fields: Mapping[str, str]) -> str:
    """HTML from its template, `fields` by name in place of `@NAME@`; in one pass, so that marks in fields stay."""
    return MARK.sub(lambda mark: fields[mark[1]], template.read_text(encoding="utf-8"))


def html_parts(tables: Mapping[str, Table], notes: Sequence[str]) -> tuple[str, str]:
    """Tables under their headings, and a list of notes."""
    texts = "".join(f"<h2>{html.escape(name)}</h2>\n{table.html()}" for name, table in tables.items())
    return texts, f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in notes)}</ul>"


def decoding_line(setup: Mapping[str, Any]) -> str:
    """A note of reports, from `setup_metadata`."""
    decoding = ", ".join(f"{key} {value}" for key, value in setup["decoding"].items())
    return f"Decoding, the same for all checkpoints: {decoding}."


def thumbnail(file: Path, side: int = THUMBNAIL) -> str:
    """A JPEG, at most `side` pixels a side, of an image file as a `data:` URI; empty if it cannot be read any more."""
    from minigpt4.processors import open_image  # loads torch, which tables do not need

    try:
        image = open_image(file)
    except SampleError:
        return ""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return data_uri("image/jpeg", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """A file of that MIME type as part of a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# Figures


@contextmanager
def figure(
    path: Path, title: str, shape: tuple[int, int], size: tuple[float, float], option: str
) -> Iterator[np.ndarray]:
    """The panels of a PNG, in `shape` rows and columns and `size` inches of 150 dots, to be drawn within the block.

    ConfigError naming `option` if the disk refuses.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(*shape, figsize=size, dpi=150, squeeze=False)
    yield panels
    drawn.suptitle(title, fontsize=9)
    drawn.tight_layout()
    try:
        drawn.savefig(path, metadata={"Software": None})  # the same numbers give the same bytes
    except OSError as error:
        raise refused(path, error, option) from error
    pyplot.close(drawn)
