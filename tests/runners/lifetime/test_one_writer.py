"""One run at a time in a folder: the second start is refused on all ranks, and a kill leaves no lock behind."""

import shutil

import pytest

AUTO = "run.resume_ckpt_path=auto"
SAVING = "run.save_every_iters=1"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_auto_is_refused_a_path_goes_beside_and_after_kill_9_each_step_is_done_once(
    processes, paused, warm, make, tools, undisturbed
):
    tiny = make("json")
    first = paused(tiny, 3, SAVING, AUTO, processes=processes)
    (folder,) = tiny.runs()
    second = warm.start(tiny, SAVING, AUTO, processes=processes)
    assert second.wait() == [2] * processes, second.text()
    assert f"{folder.resolve()}: is in use by process {first.pids[0]} on " in second.text()
    assert "run.resume_ckpt_path" in second.text()
    warm.train(tiny, f"run.resume_ckpt_path={folder}/checkpoint_iter_2.pth", processes=processes)
    (beside,) = set(tiny.runs()) - {folder}
    assert first.alive()
    shutil.rmtree(beside)  # or auto would go on from it
    first.kill()
    together = [warm.start(tiny, SAVING, AUTO, processes=processes) for _ in range(2)]
    statuses = sorted(run.wait() for run in together)
    assert statuses[0] == [0] * processes
    assert statuses[1] in ([0] * processes, [2] * processes)
    assert tiny.runs() == [folder]
    tools["compare"](folder, undisturbed("json", SAVING, processes=processes))
