"""What happens to long runs: helpers to start them quickly, to hit them at chosen moments, and to compare them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml


def change(tiny: Any, **sections: object) -> Any:
    """Replace whole sections of the recipe, and keys of `run`."""
    recipe = yaml.safe_load(tiny.recipe.read_text())
    recipe["run"].update(sections.pop("run", {}))
    tiny.recipe.write_text(yaml.safe_dump({**recipe, **sections}))
    return tiny


def plug_in(tiny: Any, name: str, **run: object) -> Any:
    """Have the recipe import plugins/NAME.py, with these keys of `run`."""
    shutil.copy(Path(__file__).with_name("plugins") / f"{name}.py", tiny.folder)
    return change(tiny, imports=[name], run=run)


def make_tricky(tiny: Any, kind: str) -> Any:
    """Give `tiny` data with bad samples, `json` (cc_sbu_align), `shards` (laion) or `mixed`, and 2 epochs of 7."""
    folder, images = tiny.folder, tiny.folder / "cc_sbu_align" / "image"
    shards = [_shard(folder / f"{number}.tar", sorted(images.iterdir())[number::3]) for number in range(3)]
    shards[2].write_bytes(shards[2].read_bytes()[:-6000])
    (images / "3.jpg").unlink()
    (images / "4.jpg").write_bytes((images / "5.jpg").read_bytes()[:700])
    datasets = yaml.safe_load(tiny.recipe.read_text())["datasets"]
    align = datasets["cc_sbu_align"]
    laion = {**align, "build_info": {"storage": f"{folder}/{{0..2}}.tar"}, "sample_ratio": 2}
    chosen = {"json": {"cc_sbu_align": align}, "shards": {"laion": laion}}
    chosen["mixed"] = {**chosen["json"], **chosen["shards"]}
    return change(tiny, datasets=chosen[kind], run={"max_bad_share": 0.6, "iters_per_epoch": 7})


def _shard(path: Path, images: list[Path]) -> Path:
    """A tar of these images with captions; the caption of the first is empty."""
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            caption = image.with_suffix(".txt")
            caption.write_text(f"A photo of {image.stem}." if number else " ")
            tar.add(image, image.name)
            tar.add(caption, caption.name)
            caption.unlink()
    return path


def alike(first: object, second: object) -> bool:
    """Equal, tensors bit for bit, whatever lies in what."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(alike(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(alike, first, second))
    return first == second


def logged(run: Path) -> list[tuple]:
    """(step, loss, rate) of each line of `metrics.jsonl`."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["lr"]) for line in lines]


def final(run: Path, name: str = "checkpoint_1.pth") -> dict:
    """Content of the last checkpoint, all but the configuration."""
    content = torch.load(run / name, weights_only=True)
    return {key: value for key, value in content.items() if key != "config"}


WAIT = 120.0
"""Seconds after which a test gives up on a process."""


def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Look again and again until it holds; fails with `what` when it takes too long."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"timeout: {what()}")
        time.sleep(0.002)


@dataclass
class WarmRun:
    """The processes of one run, by rank, and what they wrote."""

    server: "WarmServer"
    pids: list[int]
    log: Path

    def __post_init__(self) -> None:
        self.statuses: list[int | None] = [None] * len(self.pids)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def alive(self) -> bool:
        """Whether any process still runs."""
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None:
                self.statuses[rank] = self.server.ask({"poll": pid})
        return None in self.statuses

    def wait_for(self, text: str) -> None:
        """Until the log holds the text; fails if the run ends before."""

        def seen() -> bool:
            alive = self.alive()
            found = text in self.text()
            assert found or alive, f"ended without {text!r}: {self.text()[-4000:]}"
            return found

        until(seen, lambda: f"no {text!r} in {self.abort()}")

    def send(self, number: signal.Signals, rank: int = 0) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """Kill -9 for every process, workers of the loaders included."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> list[int | None]:
        """Exit statuses by rank."""
        until(lambda: not self.alive(), lambda: f"still running: {self.abort()}")
        return self.statuses

    def abort(self) -> str:
        """End a run that hangs; returns the end of its log, with the stacks of all its processes."""
        with self.log.open("ab") as log:
            return self.server.supervised.abort(lambda: self.server.supervised.in_groups(self.pids), log, self.text)


class WarmServer:
    """Starts `train.py` in a tenth of the time, from a process that has imported everything (see warm_server.py)."""

    def __init__(self, logs: Path, environment: dict[str, str], supervised: ModuleType) -> None:
        self.supervised = supervised
        self._logs = logs
        self._runs: list[WarmRun] = []
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, **supervised.STACKS},
        )

    def ask(self, request: dict) -> int | None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, tiny: Any, *options: str, processes: int = 1) -> WarmRun:
        """A run in the background; several processes are launched by environment variables, as srun does."""
        log = self._logs / f"{len(self._runs)}.log"
        argv = ["--cfg-path", str(tiny.recipe), *(["--options", *options] if options else [])]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        pids = []
        for rank in range(processes):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            pids.append(self.ask({"argv": argv, "env": env, "cwd": str(tiny.folder), "log": str(log)}))
        self._runs.append(WarmRun(self, pids, log))
        return self._runs[-1]

    def train(self, tiny: Any, *options: str, processes: int = 1) -> WarmRun:
        """Run to the end; asserts success."""
        run = self.start(tiny, *options, processes=processes)
        assert run.wait() == [0] * processes, run.text()[-6000:]
        return run

    def close(self) -> None:
        for run in self._runs:
            if run.alive():
                run.kill()
        self._process.stdin.close()
        self._process.wait(10)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, tools: dict[str, Any]) -> Iterator[WarmServer]:
    """Starts runs of a Tiny quickly."""
    server = WarmServer(tmp_path_factory.mktemp("warm"), tools["environment"](), tools["supervised"])
    yield server
    server.close()


@pytest.fixture(scope="session")
def tools(tools: dict[str, Any]) -> dict[str, Any]:
    """The helpers of all runs, and the functions above."""
    functions = (change, plug_in, alike, logged, final, free_port, until)
    return {**tools, **{function.__name__: function for function in functions}}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, parity_dir: Path, tools: dict[str, Any]) -> Callable[[str], Any]:
    """Makes a Tiny with bad samples: `json`, `shards` or `mixed`."""
    return lambda kind: make_tricky(tools["make_tiny"](tmp_path_factory.mktemp("run"), parity_dir, count=11), kind)
