"""What all sections of docs/performance.md were measured on: machine, versions, commit, matrix rates.

python benchmarks/header.py --write docs/performance.md
"""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from command import measured, parser_of
from tables import machine, matrix_rate, table

from minigpt4.common.run_folder import git_state, versions

PACKAGES = ("python", "torch", "torchvision", "transformers", "timm", "pillow", "webdataset")


def section(args: argparse.Namespace, folder: Path) -> str:
    """The Markdown section."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {name: matrix_rate(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    known, state = versions(), git_state()
    changed = ", and changes that are not committed" if state and state["changed"] else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    rows = [
        ("date", f"{datetime.now(UTC):%Y-%m-%d}"),
        ("commit", f"{state['commit']}{changed}" if state else "no git checkout"),
        ("machine", machine()),
        ("memory, GiB", f"{memory / 2**30:.0f}"),
        ("threads of torch", str(torch.get_num_threads())),
        ("versions", ", ".join(f"{name} {known[name]}" for name in PACKAGES if known.get(name))),
        *((f"matrix products in {name}, TFLOP/s", f"{rate / 1e12:.2f}") for name, rate in rates.items()),
    ]
    return (
        "## The machine\n\nWhere `benchmarks/header.py` ran last, with `run_all.sh` or by itself; each section names "
        f"the machine and commit of its own.\n\n{table(('what', 'value'), rows)}"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return parser_of(__doc__).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return measured(parse_args(argv), "header", section)


if __name__ == "__main__":
    sys.exit(main())
