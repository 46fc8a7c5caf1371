"""One run at a time in a folder: the second start is refused on all ranks, and a kill leaves no lock behind."""

import pytest

AUTO = "run.resume_ckpt_path=auto"
SAVING = ("run.save_every_iters=1",)


@pytest.fixture
def paused(warm, make, tools):
    """Starts a run that waits after 3 of its 14 iterations, with checkpoints: (tiny, run)."""

    def start(processes):
        tiny = tools["plug_in"](make("json"), "pausing", task="pausing")
        (tiny.folder / "pause").write_text("3")
        run = warm.start(tiny, *SAVING, AUTO, processes=processes)
        run.wait_for(f"rank {processes - 1} pauses")
        run.wait_for("checkpoint_iter_3.pth")
        (tiny.folder / "pause").unlink()
        return tiny, run

    return start


@pytest.mark.parametrize("processes", [1, 2])
def test_the_second_run_is_refused_and_after_kill_9_auto_goes_on_at_once(processes, paused, warm, make, tools):
    tiny, first = paused(processes)
    (folder,) = tiny.runs()
    second = warm.start(tiny, *SAVING, AUTO, processes=processes)
    assert second.wait() == [2] * processes, second.text()
    assert f"{folder.resolve()}: is in use by process {first.pids[0]} on " in second.text()
    assert "run.resume_ckpt_path" in second.text()
    first.kill()
    warm.train(tiny, *SAVING, AUTO, processes=processes)
    undisturbed = make("json")
    warm.train(undisturbed, *SAVING, processes=processes)
    assert tiny.runs() == [folder]
    assert tools["logged"](folder) == tools["logged"](undisturbed.runs()[0])
    assert tools["alike"](tools["final"](folder), tools["final"](undisturbed.runs()[0]))


def test_a_run_from_a_path_goes_beside_the_one_that_lives(paused, warm):
    tiny, first = paused(1)
    (folder,) = tiny.runs()
    beside = warm.train(tiny, f"run.resume_ckpt_path={folder / 'checkpoint_iter_2.pth'}")
    assert "Going on from" in beside.text()
    assert len(tiny.runs()) == 2
    assert first.alive()
    first.kill()


def test_of_two_autos_at_the_same_moment_each_step_is_done_once(paused, warm, tools):
    tiny, first = paused(1)
    first.kill()
    statuses = [run.wait()[0] for run in [warm.start(tiny, *SAVING, AUTO) for _ in range(2)]]
    assert sorted(statuses)[0] == 0
    assert set(statuses) <= {0, 2}
    (folder,) = tiny.runs()
    assert [step for step, _, _ in tools["logged"](folder)] == list(range(14))
