"""Download the published weights: resumable, checked, listed in weights/manifest.json.

    python scripts/download_weights.py --list  # what there is
    python scripts/download_weights.py 7b --dry-run  # what would be fetched; no network, nothing written
    python scripts/download_weights.py 7b  # all that the 7B model needs, into weights/
    python scripts/download_weights.py eva_vit_g aligned_13b --dir /data/weights
    python scripts/download_weights.py 7b --verify  # read everything again and compare the hashes

The same command resumes, and does nothing once all files are there. Llama-2 is gated: accept its licence on Hugging
Face and run `hf auth login` first. See docs/weights.md.
"""

import argparse
import logging
import sys
from pathlib import Path

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.utils import human
from minigpt4.common.weights import TABLE, WeightsEntry, WeightsFolder, WeightsTable, load_table, web_page


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 --verify found a changed file, 2 an error to read, 130 stopped by Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "wanted", nargs="*", metavar="NAME", help="presets (7b, 13b, llama2, llava15) or names of --list"
    )
    parser.add_argument("--dir", type=Path, default=Path("weights"), help="folder for the files (weights)")
    parser.add_argument("--table", type=Path, default=TABLE, help="another table, say of your own mirror")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="print names, sizes and presets")
    action.add_argument("--dry-run", action="store_true", help="print what would be fetched; no network")
    action.add_argument("--verify", action="store_true", help="hash the files again, against the manifest")
    args = parser.parse_args(argv)
    if not args.wanted and not args.list:
        parser.error("name what to download: a preset (7b, 13b, llama2, llava15) or names; --list shows them")
    try:
        table = load_table(args.table)
        if args.list:
            return show(table)
        folder, entries = WeightsFolder(args.dir), table.select(args.wanted)
        if args.dry_run:
            return plan(folder, entries)
        return verify(folder, entries) if args.verify else download(folder, entries)
    except MiniGPT4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to resume", file=sys.stderr)
        return 130


def show(table: WeightsTable) -> int:
    for entry in table.files.values():
        print(f"{entry.name:18} {human(entry.bytes or entry.about):>9}  {entry.goes_with}")
    for preset, names in table.presets.items():
        total = human(sum(table.files[name].about for name in names))
        print(f"preset {preset:11} {total:>9}  {' '.join(names)}")
    return 0


def plan(folder: WeightsFolder, entries: list[WeightsEntry]) -> int:
    print(f"into {folder.root.absolute()}")
    for entry in entries:
        state = "there" if folder.has(entry) else human(entry.bytes or entry.about)
        gated = "; gated: accept the licence there, then `hf auth login`" if entry.gated else ""
        print(f"{entry.name:18} {state:>9}  {entry.path} from {' or '.join(map(web_page, entry.sources))}{gated}")
    print(f"to fetch: about {human(folder.missing_bytes(entries))}; free: {human(folder.free_bytes())}")
    folder.need_room(entries)
    return 0


def download(folder: WeightsFolder, entries: list[WeightsEntry]) -> int:
    missing = [entry for entry in entries if not folder.has(entry)]
    if not missing:
        print(f"nothing to do: {', '.join(entry.name for entry in entries)} in {folder.root}")
    folder.need_room(missing)
    failures = []
    for entry in missing:
        try:
            folder.get(entry)
            print(f"{entry.name}: in {folder.root / entry.path}")
        except MiniGPT4Error as error:  # the others are still worth having
            failures.append(error)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


def verify(folder: WeightsFolder, entries: list[WeightsEntry]) -> int:
    names = [entry.name for entry in entries]
    problems = folder.verify(set(names))
    print("\n".join(problems) or f"whole: {', '.join(names)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
