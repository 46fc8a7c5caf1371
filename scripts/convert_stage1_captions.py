"""Turn BLIP's filtered caption files into the TSV that img2dataset reads.

    python scripts/convert_stage1_captions.py ccs_synthetic_filtered_large.json
    python scripts/convert_stage1_captions.py laion_synthetic_filtered_large.json -o laion_dataset.tsv

The files are JSON lists of `{"url": ..., "caption": ...}` of several gigabytes; they are read piece by piece. Entries
without a readable url or caption are left out and counted. Then: scripts/download_stage1_images.sh.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import exit_status, replacing, require_readable

CHUNK = 1 << 20
"""Characters read at a time."""
LONGEST = 1 << 22
"""Characters that one entry may have; what is longer is a broken file."""
BETWEEN = re.compile(r"[\s,]*")
"""What stands between two entries."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="the downloaded JSON file")
    parser.add_argument("-o", "--output", type=Path, help="TSV file to write (the input's name with .tsv)")
    args = parser.parse_args(argv)
    return exit_status(lambda: convert(args.input, args.output or args.input.with_suffix(".tsv")))


def convert(source: Path, target: Path) -> None:
    """Write `target`, which appears only when it is whole. Raises SampleError naming file and place."""
    written, left_out = 0, []
    try:
        with (
            source.open(encoding="utf-8-sig") as file,
            replacing(target) as part,
            part.open("w", newline="", encoding="utf-8") as out,
        ):
            writer = csv.writer(out, delimiter="\t", lineterminator="\n")
            writer.writerow(("url", "caption"))
            for entry in tqdm(read_entries(file, source), desc="entries", unit="", unit_scale=True):
                if row := url_and_caption(entry):
                    writer.writerow(row)
                    written += 1
                else:
                    left_out.append(json.dumps(entry)[:100] if len(left_out) < 5 else "")
    except OSError as error:
        raise SampleError(f"{error.filename or target}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SampleError(f"{source}: is not UTF-8 text ({error}); download it again") from error
    print(f"{target}: {written:,} pairs; {len(left_out):,} entries left out")
    for example in left_out[:5]:
        print(f"  left out: {example}")


def url_and_caption(entry: Any) -> tuple[str, str] | None:
    """Each on one line, for the reader takes no line breaks within a field; None where there is none."""
    fields = [entry.get(key) for key in ("url", "caption")] if isinstance(entry, dict) else []
    if not fields or not all(isinstance(field, str) and field.strip() for field in fields):
        return None
    try:
        require_readable("".join(fields), "the entry")
    except SampleError:
        return None
    url, caption = (" ".join(field.split()) for field in fields)
    return url, caption


def read_entries(file: TextIO, source: Path) -> Iterator[Any]:
    """The entries of a JSON list, one at a time, with a few megabytes in memory."""
    decoder, text, before = json.JSONDecoder(), file.read(CHUNK), 0
    at = BETWEEN.match(text).end()
    if not text.startswith("[", at):
        raise _broken(source, at, "'[' expected")
    at += 1
    while not text.startswith("]", at := BETWEEN.match(text, at).end()):
        fault = "the file ends in the middle of the list"
        try:
            entry, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:  # broken, or only cut off where the chunk ends
            fault, end = str(error), len(text)
        if end < len(text):  # at the end of the chunk a number may go on
            yield entry
            at = end
            continue
        chunk = file.read(CHUNK)
        if not chunk or len(text) - at > LONGEST:
            raise _broken(source, before + at, fault)
        before += at
        text, at = text[at:] + chunk, 0
    if (text[at + 1 :] + file.read(CHUNK)).strip():
        raise _broken(source, before + at + 1, "extra data after the list")


def _broken(source: Path, place: int, fault: str) -> SampleError:
    return SampleError(
        f'{source}: character {place:,}: {fault}. Is the download whole? It must be a JSON list of {{"url", "caption"}}'
    )


if __name__ == "__main__":
    sys.exit(main())
