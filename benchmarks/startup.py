"""Loading an LLM into several processes at once: unpickled as the original does, and by `load_llm`.

    python benchmarks/startup.py                                        # 2 processes, an LLM of 1 GB
    python benchmarks/startup.py --size 1gb --processes 2 --repeats 3 --write docs/performance.md
    python benchmarks/startup.py --size 7b --precision fp16 --dir /tmp/startup       # on a GPU; 27 GB of files
Random weights (seed 0). "Unpickled" initialises a model, reads pytorch_model*.bin into memory by torch.load, and copies
it over by load_state_dict. A way ends when the LLM of the slowest process has read a sentence, because mapped weights
come into memory when they are first used. Processes start together, with everything imported. The ways are measured in
turn; memory in a round of its own, the first, after which all files are in memory.
"""

import argparse
import multiprocessing
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from command import measured, parser_of, section
from safetensors.torch import load_file
from sizes import SIZES, write_llm
from tables import in_turn, ratio, synchronised_time
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from minigpt4.common.errors import RunError
from minigpt4.common.torch_files import INDEX, PICKLE_INDEX
from minigpt4.models.base_model import DTYPES
from minigpt4.models.llm import load_llm
from minigpt4.models.memory import GIB

TOKENS = 16
"""Of the sentence."""
LOOK = 0.03
"""Seconds between two looks at the memory of the processes."""
IMPORTED = ["torch", "transformers.models.llama.modeling_llama", "minigpt4.models.llm", "minigpt4.models.memory"]
"""Once for the processes of all rounds."""
PICKLED, SAFE = "pickled", "safetensors"
"""Folders with the same LLM."""


@dataclass(frozen=True)
class Seconds:
    """What a process spent."""

    initialise: float
    load: float
    sentence: float

    @property
    def total(self) -> float:
        return self.initialise + self.load + self.sentence


FIELDS = ("initialise", "load", "sentence", "total")


@dataclass(frozen=True)
class Job:
    """What all processes of a round do."""

    way: str
    folder: Path
    precision: str
    processes: int


def unpickled(job: Job, device: torch.device) -> tuple[nn.Module, float]:
    """As the original: initialise, read into memory, copy; the model, and the time when it was initialised."""
    folder = job.folder / PICKLED
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=DTYPES[job.precision])
    initialised = time.perf_counter()
    state = {}
    for file in sorted(folder.glob("*.bin")):
        state |= torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model.to(device), initialised


def loaded(job: Job, device: torch.device) -> tuple[nn.Module, float]:
    """As ours, which initialises nothing."""
    start = time.perf_counter()
    return load_llm(job.folder / WAYS[job.way], job.precision, device), start


PLAIN = "unpickled in each process"
WAYS = {PLAIN: PICKLED, "`load_llm`, `.bin`": PICKLED, "`load_llm`, safetensors": SAFE}
"""With the folder of each way."""


def work(connection: Connection, job: Job) -> None:
    """One process: say that it is ready, wait, load, answer with its `Seconds`, and stay until it is told to end."""
    torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    connection.send("ready")
    connection.recv()
    start = time.perf_counter()
    model, initialised = (unpickled if job.way == PLAIN else loaded)(job, device)
    ready = synchronised_time()
    with torch.inference_mode():
        model(input_ids=torch.arange(TOKENS, device=device)[None], use_cache=False)
    connection.send(Seconds(initialised - start, ready - initialised, synchronised_time() - ready))
    connection.recv()


def timed(job: Job, look_at_memory: bool = False) -> tuple[Seconds, int]:
    """A round of one way: the seconds of the slowest process, and the peak of the memory that loading added, bytes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    pipes = [context.Pipe() for _ in range(job.processes)]
    processes = [context.Process(target=work, args=(theirs, job), daemon=True) for _, theirs in pipes]
    ours = [connection for connection, _ in pipes]
    try:
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # so that a process that died is noticed
        for connection in ours:
            connection.recv()
        pids = [process.pid for process in processes] if look_at_memory else []
        before = memory(pids)
        for connection in ours:
            connection.send("start")
        peak = _peak(pids, ours)
        answers = [connection.recv() for connection in ours]
        for connection in ours:
            connection.send("end")
    except EOFError as error:
        raise RunError(f"{job.way}: a process ended before it had loaded; its own error stands above") from error
    finally:
        for process in processes:
            process.join(30)
    return max(answers, key=lambda seconds: seconds.total), peak - before


def _peak(pids: list[int], connections: list[Connection]) -> int:
    """Highest memory until all have answered; waits for nothing if there are no processes to look at."""
    peak = 0
    while pids and len(wait(connections, timeout=0)) < len(connections):
        peak = max(peak, memory(pids))
        time.sleep(LOOK)
    return max(peak, memory(pids))


def memory(pids: list[int]) -> int:
    """Bytes of physical memory of these processes together; what they share counts once (the sum of Pss)."""
    found = [
        re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE) for pid in pids
    ]
    return sum(int(match[1]) * 1024 for match in found)


def prepare(folder: Path, size: str, precision: str) -> None:
    """The LLM as safetensors and, by the same shards, as pickles; what is there stays."""
    safe, pickled = folder / SAFE, folder / PICKLED
    if pickled.exists():
        return
    torch.manual_seed(0)
    write_llm(safe, SIZES[size].llm_config(), DTYPES[precision])
    part = folder / f".{PICKLED}"
    part.mkdir(exist_ok=True)
    for file in safe.iterdir():
        if file.suffix == ".safetensors":
            torch.save(load_file(file), part / f"pytorch_{file.stem}.bin")
        elif file.name == INDEX:
            text = re.sub(r'"(model[\w-]*)\.safetensors"', r'"pytorch_\1.bin"', file.read_text())
            (part / PICKLE_INDEX).write_text(text)
        else:
            shutil.copy(file, part)
    part.rename(pickled)


def measure(args: argparse.Namespace, folder: Path) -> str:
    """The Markdown section."""
    prepare(folder, args.size, args.precision)
    jobs = {way: Job(way, folder, args.precision, args.processes) for way in WAYS}
    peaks = {way: timed(job, look_at_memory=True)[1] for way, job in jobs.items()}
    seconds: dict[str, list[Seconds]] = {way: [] for way in WAYS}
    for way in in_turn(WAYS, args.repeats):
        seconds[way].append(timed(jobs[way])[0])
    return _section(args, folder, seconds, peaks)


def _section(args: argparse.Namespace, folder: Path, seconds: dict[str, list[Seconds]], peaks: dict[str, int]) -> str:
    times = ("initialise, s", "load, s", "first sentence, s", "in all, s")
    head = ("LLM", *times, "times faster", "memory, GiB", "of plain")
    rows = [
        (
            way,
            *(f"{statistics.median(getattr(s, name) for s in own):.2f}" for name in FIELDS),
            f"{ratio([s.total for s in seconds[PLAIN]], [s.total for s in own]):.1f}",
            f"{peaks[way] / GIB:.2f}",
            f"{peaks[way] / peaks[PLAIN]:.0%}",
        )
        for way, own in seconds.items()
    ]
    gigabytes = sum(file.stat().st_size for file in (folder / SAFE).glob("*.safetensors")) / 1e9
    ours = list(seconds)[-1]
    reading = ratio([s.load + s.sentence for s in seconds[PLAIN]], [s.load + s.sentence for s in seconds[ours]])
    text = (
        f"An LLM of {gigabytes:.2f} GB in {args.precision}, loaded by {args.processes} processes at the same time "
        f"until it has read {TOKENS} tokens; the slowest process, median of {args.repeats} rounds. The files are in "
        "memory and everything is imported. Memory is the peak of what loading added to all processes together, shared "
        "pages once; of that, pages of mapped files can be taken back. Without the random numbers that the first "
        f"way draws to throw away, the last would be {reading:.1f} times faster."
    )
    return section(args, "startup", f"### Start-up of {args.processes} processes, size {args.size}", text, head, rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, weights=True)
    parser.add_argument("--size", choices=SIZES, default="1gb")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of the files and in memory (bf16)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return measured(args, f"startup {args.size} {args.processes}", measure)


if __name__ == "__main__":
    sys.exit(main())
