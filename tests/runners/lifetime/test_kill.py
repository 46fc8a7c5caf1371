"""Kills at any moment, crashes and errors of one rank: nothing is lost, nothing hangs."""

import random
import signal
import time

import pytest

from minigpt4.common.checkpoint import newest_checkpoint, read_card, read_checkpoint

AUTO = "run.resume_ckpt_path=auto"
SAVING = ("run.save_every_iters=1", "run.keep_last=3")
PHASES = ("half a file", "before the new file", "new file without card")
ONE, TWO = ("run.num_workers=0",), ("run.num_workers=1", "run.accum_grad_iters=3")
LORA = ("model.train.projection.lr=1e-3", "model.train.llm.r=4", "model.train.llm.rule=lora")
FULL = ("model.train.projection.lr=1e-3", "model.train.llm=full")


def _iterations(tiny) -> int:
    """Iterations in the checkpoint that `auto` takes, which must be whole."""
    newest = newest_checkpoint(tiny.output, "minigpt4") if tiny.output.exists() else None
    if newest is None:
        return 0
    read_checkpoint(newest)
    return read_card(newest)["iteration"]


def _hold(tiny, kill: int, chance: random.Random) -> str | None:
    """Have every second start held in a part of a save; returns the part."""
    hold, part = tiny.folder / "hold", PHASES[kill // 2 % len(PHASES)]
    hold.write_text("" if kill % 2 else f"{part} {chance.randint(1, 3)}")
    return None if kill % 2 else part


def _end_after(run, seconds: float, *, gently: bool) -> None:
    """Kill -9 so long after training began, or have it save and stop."""
    run.wait_for("Start training")
    time.sleep(seconds)
    if not gently:
        run.kill()
        return
    run.send(signal.SIGTERM)
    assert run.wait() == [0] * len(run.pids), run.text()[-6000:]


@pytest.mark.parametrize(
    ("kind", "processes", "kills", "options"),
    [
        ("mixed", 1, 10, ONE),
        ("mixed", 2, 6, TWO),
        ("llava", 1, 4, ONE + LORA),
        ("llava", 1, 4, ONE + FULL),
        ("llava", 2, 4, TWO + LORA),
        ("llava", 2, 4, (*TWO, *FULL, "run.parallel=fsdp")),
    ],
    ids=lambda value: value[-1].rpartition(".")[2] if isinstance(value, tuple) else None,
)
def test_kills_at_random_moments_lose_nothing(
    kind, processes, kills, options, warm, make, tools, undisturbed, fuzz_factor
):
    chance, options = random.Random(processes), (*SAVING, f"run.iters_per_epoch={3 * kills * fuzz_factor}", *options)
    tiny, done = tools["plug_in"](make(kind), "slow_disk"), 0
    for kill in range(kills * fuzz_factor):
        part = _hold(tiny, kill, chance)
        run = warm.start(tiny, *options, AUTO, processes=processes)
        if part is None:
            _end_after(run, chance.uniform(0, 0.4), gently=kill % 4 == 3)
        else:
            run.wait_for(f"held: {part}")
            run.kill()
        before, done = done, _iterations(tiny)
        assert done >= before
    (tiny.folder / "hold").unlink()
    warm.train(tiny, *options, AUTO, processes=processes)
    folder = max(tiny.runs(), key=lambda path: len(list(path.iterdir())))
    tools["compare"](folder, undisturbed(kind, *options, processes=processes))
    assert not list(folder.glob(".*"))


def test_kill_9_of_one_rank_ends_the_others_and_auto_goes_on(paused, warm, make, tools, undisturbed):
    tiny, saving = make("json"), "run.save_every_iters=1"
    run = paused(tiny, 5, saving, processes=2)
    run.send(signal.SIGKILL, rank=1)
    (tiny.folder / "go").touch()
    statuses = run.wait()
    assert statuses[0] not in (0, None)
    assert statuses[1] == -signal.SIGKILL
    assert _iterations(tiny) == 5
    warm.train(tiny, saving, AUTO, processes=2)
    tools["compare"](tiny.runs()[0], undisturbed("json", saving, processes=2))


def test_error_of_one_rank_ends_the_whole_run_with_its_message(warm, make, tools):
    run = warm.start(tools["plug_in"](make("json"), "raising", task="raising"), processes=2)
    assert 0 not in run.wait()
    assert "ValueError: the step of rank 1 is broken" in run.text()
