"""Turn BLIP's filtered caption files into the TSV that img2dataset reads.

    python scripts/convert_stage1_captions.py ccs_synthetic_filtered_large.json
    python scripts/convert_stage1_captions.py laion_synthetic_filtered_large.json -o laion_dataset.tsv

The files are JSON lists of `{"url": ..., "caption": ...}` of several gigabytes; they are read piece by piece. Entries
without a readable url or caption, or with a field that stands twice, are left out and counted. Then:
scripts/download_stage1_images.sh.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import exit_status, replacing, require_readable, unique_fields

CHUNK = 1 << 20
"""Characters read at a time."""

LONGEST = 1 << 22
"""Characters that one entry may have; what is longer is a broken file."""

SPACE = " \t\r\n"
TOKEN = re.compile(r'"(?:[^"\\]|\\.|\\\Z)*(?:"|\Z)|[\[\]{},]', re.DOTALL)
"""A string, cut off or not, and what JSON's structure is made of."""


@dataclass
class Counts:
    """What became of the entries."""

    written: int = 0
    left_out: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few that were left out."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return exit_status(lambda: report(convert(args.input, output_of(args)), output_of(args)))


def output_of(args: argparse.Namespace) -> Path:
    """The file to write."""
    return args.output or args.input.with_suffix(".tsv")


def report(counts: Counts, output: Path) -> None:
    """What became of the entries, for the terminal."""
    print(f"{output}: {counts.written:,} pairs; {counts.left_out:,} entries left out")
    for example in counts.examples:
        print(f"  left out: {example}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="the downloaded JSON file")
    parser.add_argument("-o", "--output", type=Path, help="TSV file to write (the input's name with .tsv)")
    return parser.parse_args(argv)


def convert(source: Path, target: Path) -> Counts:
    """Write `target`; it appears only when it is whole. Raises SampleError naming file and place."""
    try:
        with (
            source.open(encoding="utf-8-sig") as file,
            replacing(target) as part,
            part.open("w", newline="", encoding="utf-8") as out,
        ):
            counts = write_rows(_with_bar(read_entries(file, source)), out)
    except OSError as error:
        raise SampleError(f"{error.filename or target}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SampleError(f"{source}: is not UTF-8 text ({error}); download it again") from error
    return counts


def _with_bar(entries: Iterator[Any]) -> Iterator[Any]:
    return iter(tqdm(entries, desc="entries", unit="", unit_scale=True))


def write_rows(entries: Iterator[Any], out: TextIO) -> Counts:
    """Write a header and a row per entry; img2dataset reads them with the usual quoting of CSV."""
    counts, writer = Counts(), csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(("url", "caption"))
    for entry in entries:
        row = _row(entry)
        if row is None:
            counts.left_out += 1
            counts.examples += [json.dumps(entry)[:100]] if len(counts.examples) < 5 else []
            continue
        writer.writerow(row)
        counts.written += 1
    return counts


def _row(entry: Any) -> tuple[str, str] | None:
    """URL and caption, each on one line, for the reader takes no line breaks within a field."""
    if not isinstance(entry, dict):
        return None
    values = [entry.get(key) for key in ("url", "caption")]
    if not all(isinstance(value, str) for value in values):
        return None
    url, caption = (" ".join(value.split()) for value in values)
    try:
        require_readable(url + caption, "the entry")
    except SampleError:
        return None
    return (url, caption) if url and caption else None


def read_entries(file: TextIO, source: Path) -> Iterator[Any]:
    """The entries of a JSON list, one at a time, with a few megabytes in memory."""
    text = _Window(file, source)
    text.expect("[")
    more = text.peek() != "]"
    while more:
        yield text.value()
        more = text.peek() != "]"
        if more:
            text.expect(",")
    text.expect("]")
    text.expect_end()


class _Window:
    """The part of a JSON text that is being looked at."""

    def __init__(self, file: TextIO, source: Path) -> None:
        self._file, self._source = file, source
        self._text, self._at, self._before = "", 0, 0
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_fields)

    def peek(self) -> str:
        """The next character that is no white space."""
        found = self._next()
        if not found:
            raise self._error("the file ends in the middle of the list")
        return found

    def expect_end(self) -> None:
        if found := self._next():
            raise self._error(f"extra data after the list, {found!r}")

    def _next(self) -> str:
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self._error(f"{character!r} expected, {found!r} found")
        self._at += 1

    def value(self) -> Any:
        """The JSON value that comes next; its text if its fields, numbers or depth are refused."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Either the value goes on behind the window, or it is broken; only more text can tell.
                if len(self._text) - self._at > LONGEST or not self._read_on():
                    raise self._error(str(error)) from error
            except (ValueError, RecursionError) as error:
                return self._skip("nested too deeply" if isinstance(error, RecursionError) else str(error))
            else:
                if end == len(self._text) and self._read_on():
                    continue  # a number may go on there
                self._at = end
                return value

    def _skip(self, fault: str) -> str:
        """The text up to the comma or bracket that ends the entry."""
        while len(self._text) - self._at <= LONGEST:
            depth = 0
            for token in TOKEN.finditer(self._text, self._at):
                if depth == 0 and token[0] in ",]}":
                    start, self._at = self._at, token.start()
                    return self._text[start : self._at]
                depth += (token[0] in "[{") - (token[0] in "]}")
            if not self._read_on():
                break
        raise self._error(fault)

    def _read_on(self) -> bool:
        """Drop what is done with and append a chunk; False at the end of the file."""
        chunk = self._file.read(CHUNK)
        self._before += self._at
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def _error(self, what: str) -> SampleError:
        return SampleError(
            f"{self._source}: character {self._before + self._at:,}: {what}. Is the download whole? It must be a JSON "
            'list of {"url", "caption"}'
        )


if __name__ == "__main__":
    sys.exit(main())
