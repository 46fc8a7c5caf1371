"""A signal to any process of a run: all ranks save together and stop, and the run goes on as if nothing had been."""

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from minigpt4.common.checkpoint import newest_checkpoint

OPTIONS = ("run.num_workers=2", "run.accum_grad_iters=3", "run.accum_loss=sum")
AUTO = "run.resume_ckpt_path=auto"


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def whole(request, warm, make):
    """An uninterrupted run: (its folder, number of processes)."""
    tiny = make("mixed")
    warm.train(tiny, *OPTIONS, processes=request.param)
    (run,) = tiny.runs()
    return run, request.param


def _pause(tiny, steps: int) -> None:
    """The next start waits after this many iterations."""
    (tiny.folder / "go").unlink(missing_ok=True)
    (tiny.folder / "pause").write_text(str(steps))


def _go(tiny) -> None:
    (tiny.folder / "pause").unlink()
    (tiny.folder / "go").touch()


def _stopped_at(run: Path) -> int:
    return max(int(path.stem.split("_")[-1]) for path in run.glob("checkpoint_iter_*.pth"))


def test_signals_to_one_rank_stop_all_and_auto_goes_on(whole, warm, make, tools):
    run, processes = whole
    tiny = tools["plug_in"](make("mixed"), "pausing", task="pausing")
    last = processes - 1
    kinds = [(signal.SIGTERM, last, 1, 2), (signal.SIGINT, 0, 2, 5), (signal.SIGUSR1, last, 4, 10)]
    for number, rank, steps, done in kinds:
        _pause(tiny, steps)
        started = warm.start(tiny, *OPTIONS, AUTO, processes=processes)
        started.wait_for(f"rank {rank} pauses")
        started.send(number, rank)
        _go(tiny)
        assert started.wait() == [0] * processes, started.text()
        assert f"Stopped by a signal after {done} iterations" in started.text()
        (stopped,) = tiny.runs()
        assert _stopped_at(stopped) == done
    warm.train(tiny, *OPTIONS, AUTO, processes=processes)
    assert tools["logged"](stopped) == tools["logged"](run)
    assert (stopped / "log.txt").read_text() == (run / "log.txt").read_text()
    assert tools["alike"](tools["final"](stopped), tools["final"](run))


def test_signal_in_the_last_iteration_of_an_epoch_stops_behind_its_checkpoint(warm, make, tools):
    tiny = tools["plug_in"](make("json"), "pausing", task="pausing")
    _pause(tiny, 6)
    started = warm.start(tiny, "run.num_workers=2")
    started.wait_for("rank 0 pauses")
    started.send(signal.SIGTERM)
    _go(tiny)
    assert started.wait() == [0]
    (run,) = tiny.runs()
    assert [path.name for path in run.glob("*.pth")] == ["checkpoint_0.pth"]
    assert newest_checkpoint(tiny.output, "minigpt4") == run / "checkpoint_0.pth"


def _rank_pids(torchrun: int) -> dict[int, int]:
    """Process ids of the ranks under a torchrun."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    pids = {}
    for pid in children:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        pids |= {int(entry[5:]): int(pid) for entry in environ if entry.startswith(b"RANK=")}
    return pids


@contextmanager
def _torchrun_in_pause(tiny, tools, *options: str):
    """A torchrun whose two ranks pause."""
    command = tiny.command(*options, processes=2)
    with tools["supervised"].started(command, env=tools["environment"](), cwd=tiny.folder) as run:
        _wait_for_both(tools, run, "pauses")
        yield run


def _wait_for_both(tools, run, what: str) -> None:
    tools["until"](lambda: all(f"rank {rank} {what}" in run.text() for rank in range(2)), run.abort)
    assert run.process.poll() is None


def test_torchrun_ends_whole_after_a_signal_to_one_rank_or_to_itself(warm, make, tools):
    tiny = make("json")
    warm.train(tiny, *OPTIONS, processes=2)
    (run,) = tiny.runs()
    tools["plug_in"](tiny, "pausing", task="pausing", output_dir=str(tiny.folder / "stopped"))
    _pause(tiny, 3)
    with _torchrun_in_pause(tiny, tools, *OPTIONS, AUTO) as torchrun:
        os.kill(_rank_pids(torchrun.process.pid)[1], signal.SIGTERM)
        _go(tiny)
        assert torchrun.wait(60) == 0, torchrun.text()
    (stopped,) = (tiny.folder / "stopped").iterdir()
    assert _stopped_at(stopped) == 4
    _pause(tiny, 5)
    with _torchrun_in_pause(tiny, tools, *OPTIONS, AUTO) as torchrun:
        torchrun.process.terminate()
        _wait_for_both(tools, torchrun, "is asked to stop")
        _go(tiny)
        torchrun.wait(60)
    assert _stopped_at(stopped) == 10
    warm.train(tiny, *OPTIONS, AUTO, processes=2)
    assert tools["logged"](stopped) == tools["logged"](run)
    assert tools["alike"](tools["final"](stopped), tools["final"](run))
