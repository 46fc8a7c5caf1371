"""What the command lines of all benchmarks share."""

import argparse
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

from tables import write_section

from minigpt4.common.utils import exit_status


def parser_of(description: str, *, weights: bool = False) -> argparse.ArgumentParser:
    """A parser with `--write`, and with `--dir` if the benchmark writes weights."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if weights:
        parser.add_argument("--dir", type=Path, help="where the weights go, to be used again (a temporary folder)")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the section into this file, too")
    return parser


def given_switches(args: argparse.Namespace, *names: str) -> str:
    """For the command that a section shows: those of the named switches that were given, and `--only`."""
    given = [f" --{name}" for name in names if getattr(args, name)]
    return "".join([*given, f" --only {shlex.join(args.only)}" if args.only else ""])


def publish(args: argparse.Namespace, mark: str, text: str) -> None:
    """Print a section, and put it between the marks of a file if `--write` says so."""
    print(text)
    if args.write:
        write_section(args.write, mark, text)


def measured(args: argparse.Namespace, mark: str, measure: Callable[[argparse.Namespace, Path], str]) -> int:
    """Measure, given `--dir` or a folder that is deleted, and publish; the exit status."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            publish(args, mark, measure(args, getattr(args, "dir", None) or Path(temporary)))

    return exit_status(run)
