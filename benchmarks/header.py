"""What all sections of docs/performance.md were measured on: machine, versions, commit, matrix rates.

python benchmarks/header.py --write docs/performance.md
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from command import parser_of, publish
from tables import machine, matrix_rate, table

from minigpt4.common.run_folder import git_state, versions
from minigpt4.common.utils import exit_status

MARK = "header"
PACKAGES = ("python", "torch", "torchvision", "transformers", "timm", "pillow", "webdataset")
GIB = 2**30


def section() -> str:
    """The Markdown section."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {name: matrix_rate(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    known, state = versions(), git_state()
    rows = [
        ("date", f"{datetime.now(UTC):%Y-%m-%d}"),
        ("commit", _commit(state) if state else "no git checkout"),
        ("machine", machine()),
        ("memory, GiB", f"{_memory(device) / GIB:.0f}"),
        ("threads of torch", str(torch.get_num_threads())),
        ("versions", ", ".join(f"{name} {known[name]}" for name in PACKAGES if known.get(name))),
        *((f"matrix products in {name}, TFLOP/s", f"{rate / 1e12:.2f}") for name, rate in rates.items()),
    ]
    return (
        "## The machine\n\nWhere `benchmarks/header.py` ran last, with `run_all.sh` or by itself; each section names "
        f"the machine and commit of its own.\n\n{table(('what', 'value'), rows)}"
    )


def _commit(state: dict[str, object]) -> str:
    return f"{state['commit']}{', and changes that are not committed' if state['changed'] else ''}"


def _memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemTotal:")))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    text = section()
    publish(args, MARK, text)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
