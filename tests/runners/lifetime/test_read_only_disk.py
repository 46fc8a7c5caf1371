"""A disk that turns read-only while a run goes on: its error is what the run ends with."""

import subprocess

import pytest

AUTO = "run.resume_ckpt_path=auto"


@pytest.mark.parametrize("processes", [1, 2])
def test_the_run_ends_with_the_disks_error_and_auto_goes_on(processes, disk, warm, make, paused, tools):
    tiny, options = make("json"), ("run.save_every_iters=1", f"run.output_dir={disk}")
    run = paused(tiny, 3, *options, processes=processes)
    remounted = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, text=True)
    assert remounted.returncode == 0, remounted.stderr
    (tiny.folder / "go").touch()
    assert run.wait()[0] == 2
    assert "checkpoint_iter_4.pth: could not be saved: [Errno 30] Read-only file system" in run.text()
    again = warm.start(tiny, *options, AUTO, processes=processes)
    assert again.wait() == [2] * processes
    assert "Read-only file system" in again.text()
    assert "Traceback" not in run.text() + again.text()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    warm.train(tiny, *options, AUTO, processes=processes)
    (folder,) = disk.iterdir()
    assert [step for step, _, _ in tools["logged"](folder)] == list(range(14))
