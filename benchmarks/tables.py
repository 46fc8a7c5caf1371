"""What all benchmarks print: the machine, a Markdown table, and its place in docs/performance.md."""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from minigpt4.common.errors import ConfigError
from minigpt4.common.run_folder import git_state, versions

REPOSITORY = Path(__file__).parents[1]
MATRIX = 2048
T = TypeVar("T")


def environment() -> dict[str, str]:
    """Of processes that are to import this checkout."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def machine() -> str:
    """Processor, GPU, versions and commit."""
    known = versions()
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpu.read_text()) if cpu.exists() else []
    cores = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"
    packages = ", ".join(f"{name} {known[name]}" for name in ("python", "torch", "transformers"))
    state = git_state()
    commit = f"commit {state['commit'][:10]}" if state else "no git checkout"
    return f"{cores}, {known['gpu'] or 'no GPU'}, {packages}, {commit}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks of `name` in a file, or at its end; ConfigError if the disk refuses."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{text.rstrip()}\n{end}\n"
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}\n", re.DOTALL)
        after = pattern.sub(lambda _: block, before) if pattern.search(before) else f"{before}\n{block}".lstrip("\n")
        path.write_text(after, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--write: {path}: {error.strerror}") from error


def synchronised_time() -> float:
    """Seconds, with all GPU work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_in_turn(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, measured in turn so that what else the machine does meets all of them; once unmeasured."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in in_turn(ways, repeats):
        start = synchronised_time()
        ways[name]()
        seconds[name].append(synchronised_time() - start)
    return seconds


def in_turn(ways: Iterable[T], rounds: int) -> Iterator[T]:
    """Each way once a round, in every other round backwards."""
    order = list(ways)
    for number in range(rounds):
        yield from order if number % 2 == 0 else order[::-1]


def ratio(plain: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster `other` is: the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(plain, other, strict=True))


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of square matrix products of this type: on a GPU of 20 in a row, else the best of ten."""
    if device.type == "cuda":
        a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
        a @ b
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            a @ b
        end.record()
        end.synchronize()
        return 20 * 2 * len(a) ** 3 / max(1e-9, start.elapsed_time(end) / 1e3)
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * MATRIX**3 / best
