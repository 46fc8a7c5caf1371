"""A disk that is full in the middle of a save: a clear error, and nothing that was saved before is lost."""

import subprocess
from pathlib import Path

import pytest

from minigpt4.common.checkpoint import newest_checkpoint, read_card, read_checkpoint

SAVING = ("run.iters_per_epoch=20", "run.save_every_iters=1")
AUTO = "run.resume_ckpt_path=auto"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a disk here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _whole(output: Path) -> int:
    """Iterations in the newest checkpoint, which must be whole and have no half written files beside it."""
    newest = newest_checkpoint(output, "minigpt4")
    read_checkpoint(newest)
    assert not [path for path in newest.parent.iterdir() if path.suffix == ".tmp"]
    return read_card(newest)["iteration"]


@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk_stops_all_ranks_clearly_and_auto_goes_on_with_room(processes, small_disk, warm, make, tools):
    tiny = make("json")
    output = f"run.output_dir={small_disk}"
    run = warm.start(tiny, *SAVING, output, processes=processes)
    statuses = run.wait()
    assert 0 not in statuses
    assert statuses[0] == 2
    assert "could not be saved" in run.text()
    assert "No space left on device" in run.text()
    assert "free some space" in run.text()
    assert 0 < _whole(small_disk) < 39
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    warm.train(tiny, *SAVING, output, AUTO, processes=processes)
    warm.train(tiny, *SAVING, processes=processes)
    (resumed,) = small_disk.iterdir()
    (whole,) = tiny.runs()
    assert tools["alike"](tools["final"](resumed), tools["final"](whole))


def test_save_that_hits_the_file_size_limit_leaves_the_earlier_file_and_its_card(warm, make, tools):
    tiny = tools["plug_in"](make("json"), "small_files")
    run = warm.start(tiny, *SAVING)
    assert run.wait() == [2]
    assert "could not be saved" in run.text()
    assert _whole(tiny.output) == 5
