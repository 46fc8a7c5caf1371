"""A signal to any process of a run: all ranks save together and stop, and the run goes on as if nothing had been."""

import signal
import sys
from pathlib import Path

import pytest

from minigpt4.common.checkpoint import newest_checkpoint

REPOSITORY = Path(__file__).parents[3]
OPTIONS = ("run.num_workers=2", "run.accum_grad_iters=3", "run.accum_loss=sum")
AUTO = "run.resume_ckpt_path=auto"


def _stopped_at(run: Path) -> int:
    return max(int(path.stem.split("_")[-1]) for path in run.glob("checkpoint_iter_*.pth"))


@pytest.mark.parametrize("processes", [1, 2])
def test_signals_to_one_rank_stop_all_and_auto_goes_on(processes, paused, warm, make, tools, undisturbed):
    tiny, last = make("mixed"), processes - 1
    kinds = [(signal.SIGTERM, last, 1, 2), (signal.SIGINT, 0, 2, 5), (signal.SIGUSR1, last, 4, 10)]
    for number, rank, steps, done in kinds:
        started = paused(tiny, steps, *OPTIONS, AUTO, processes=processes)
        started.send(number, rank)
        (tiny.folder / "go").touch()
        assert started.wait() == [0] * processes, started.text()
        assert f"Stopped by a signal after {done} iterations" in started.text()
        (stopped,) = tiny.runs()
        assert _stopped_at(stopped) == done
    warm.train(tiny, *OPTIONS, AUTO, processes=processes)
    tools["compare"](stopped, undisturbed("mixed", *OPTIONS, processes=processes))


def test_signal_in_the_last_iteration_of_an_epoch_stops_behind_its_checkpoint(paused, make):
    tiny = make("json")
    started = paused(tiny, 6, "run.num_workers=2")
    started.send(signal.SIGTERM)
    (tiny.folder / "go").touch()
    assert started.wait() == [0]
    (run,) = tiny.runs()
    assert [path.name for path in run.glob("*.pth")] == ["checkpoint_0.pth"]
    assert newest_checkpoint(tiny.output, "minigpt4") == run / "checkpoint_0.pth"


def test_torchrun_starts_a_crashed_rank_again_and_when_it_is_ended_all_save_together(warm, make, tools, undisturbed):
    tiny = make("mixed")
    pause = tools["prepare_pause"](tiny, 6, task="crashing_once")
    options = (*OPTIONS, "run.save_every_iters=2", AUTO)
    train = (str(REPOSITORY / "train.py"), "--cfg-path", str(tiny.recipe), "--options", *options)
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--max-restarts=1")
    with tools["supervised"].started([*command, *train], env=tools["environment"](), cwd=tiny.folder) as torchrun:
        _wait_for_both(tools, torchrun, "pauses")
        assert "checkpoint_iter_4.pth at epoch 0, iteration 4" in torchrun.text()
        pause.unlink()
        torchrun.process.terminate()
        _wait_for_both(tools, torchrun, "is asked to stop")
        (tiny.folder / "go").touch()
        torchrun.wait(60)
    (stopped,) = tiny.runs()
    assert _stopped_at(stopped) == 11
    warm.train(tiny, *options, processes=2)
    tools["compare"](stopped, undisturbed("mixed", *OPTIONS, processes=2))


def _wait_for_both(tools, run, what: str) -> None:
    tools["until"](lambda: all(f"rank {rank} {what}" in run.text() for rank in range(2)), run.abort)
    assert run.process.poll() is None
