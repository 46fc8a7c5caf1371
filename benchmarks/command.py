"""What the command lines and the sections of all benchmarks share."""

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tables import REPOSITORY, machine, table, write_section

from minigpt4.common.utils import exit_status


class Parser(argparse.ArgumentParser):
    """Keeps what was typed as `args.typed`, for the section that shows it, without the places of this machine."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """As argparse does."""
        found = super().parse_args(args, namespace)
        typed = shlex.join(sys.argv[1:] if args is None else args).replace(f"{REPOSITORY}/", "")
        found.typed = re.sub(r"(?<![\w.])/\S*/", "", re.sub(r" ?--(dir|write) \S+", "", typed)).strip()
        return found


def parser_of(description: str, *, weights: bool = False) -> Parser:
    """A parser with `--write`, and with `--dir` if the benchmark writes weights."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if weights:
        parser.add_argument("--dir", type=Path, help="where the weights go, to be used again (a temporary folder)")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the section into this file, too")
    return parser


def section(
    args: argparse.Namespace, name: str, title: str, text: str, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """Markdown: what benchmarks/`name`.py measured, its command, the machine, and a table."""
    command = f"python benchmarks/{name}.py {args.typed}".rstrip()
    threads = f"{torch.get_num_threads()} threads"
    return f"{title}\n\n{text}\n\n    {command}\n\nMachine: {machine()}, {threads}.\n\n{table(head, rows)}"


def measured(args: argparse.Namespace, mark: str, measure: Callable[[argparse.Namespace, Path], str]) -> int:
    """Measure, given `--dir` or a folder that is deleted; print the section and, with `--write`, put it between its
    marks in a file. The exit status."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            text = measure(args, getattr(args, "dir", None) or Path(temporary))
        print(text)
        if args.write:
            write_section(args.write, mark, text)

    return exit_status(run)
