"""Scripts that start quickly, in the background: to hit them at chosen moments, or to wait for their end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

WAIT = 300.0
"""Seconds after which a test gives up on a process."""
TRAIN = Path(__file__).parents[1] / "train.py"


def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Look again and again until it holds; fails with `what` when it takes too long."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"timeout: {what()}")
        time.sleep(0.005)


@dataclass
class WarmRun:
    """The processes of one run, by rank, and what they wrote."""

    server: "WarmServer"
    pids: list[int]
    log: Path
    """Standard error, or both streams."""

    out: Path

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
    """Starts scripts in a tenth of the time, from a process that has imported everything (see warm_server.py)."""

    def __init__(self, logs: Path, environment: dict[str, str], supervised: ModuleType, *late: str) -> None:
        self.supervised = supervised
        self._logs = logs
        self._runs: list[WarmRun] = []
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py")), *late],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONUNBUFFERED": "1", **supervised.STACKS},
        )

    def ask(self, request: dict) -> int | None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def script(
        self,
        *argv: object,
        cwd: Path,
        processes: int = 1,
        env: dict[str, str] | None = None,
        path: tuple[Path, ...] = (),
        apart: bool = False,
        stdin: str = "",
    ) -> WarmRun:
        """A script, or a module by its name, in the background; several processes are launched by environment
        variables, as srun does.

        `path` is put before `sys.path`; `apart`: standard output goes to a file of its own.
        """
        log, argv = self._logs / f"{len(self._runs)}.log", [str(one) for one in argv]
        out = log.with_suffix(".out") if apart else log
        log.with_suffix(".in").write_text(stdin)
        streams = {"in": str(log.with_suffix(".in")), "out": str(out), "err": str(log)}
        asked = {"argv": argv, "cwd": str(cwd), "path": [str(one) for one in path], **streams}
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        pids = []
        for rank in range(processes):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            pids.append(self.ask({**asked, "env": {**own, **(env or {})}}))
        self._runs.append(WarmRun(self, pids, log, out))
        return self._runs[-1]

    def start(self, tiny: Any, *options: str, **more: Any) -> WarmRun:
        """`train.py` with the recipe of a Tiny."""
        given = ["--options", *options] if options else []
        return self.script(TRAIN, "--cfg-path", tiny.recipe, *given, cwd=tiny.folder, **more)

    def train(self, tiny: Any, *options: str, **more: Any) -> WarmRun:
        """Run to the end; asserts success."""
        run = self.start(tiny, *options, **more)
        assert not any(run.wait()), run.text()[-6000:]
        return run

    def close(self) -> None:
        for run in self._runs:
            if run.alive():
                run.kill()
        self._process.kill()
        self._process.wait()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
