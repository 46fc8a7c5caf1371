"""A disk that is full in the middle of a save: a clear error, and nothing that was saved before is lost."""

import subprocess
from pathlib import Path

import pytest

from minigpt4.common.checkpoint import newest_checkpoint, read_card, read_checkpoint

SAVING = ("run.iters_per_epoch=20", "run.save_every_iters=1")
AUTO = "run.resume_ckpt_path=auto"


def _resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def _whole(output: Path) -> int:
    """Iterations in the newest checkpoint, which must be whole and have no half written files beside it."""
    newest = newest_checkpoint(output, "minigpt4")
    read_checkpoint(newest)
    assert not [path for path in newest.parent.iterdir() if path.suffix == ".tmp"]
    return read_card(newest)["iteration"]


@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk_stops_all_ranks_clearly_and_auto_goes_on_with_room(processes, disk, warm, make, tools, undisturbed):
    tiny, output = make("json"), f"run.output_dir={disk}"
    _resize(disk, "1m")
    run = warm.start(tiny, *SAVING, output, processes=processes)
    statuses = run.wait()
    assert 0 not in statuses
    assert statuses[0] == 2
    assert "could not be saved" in run.text()
    assert "No space left on device" in run.text()
    assert "free some space" in run.text()
    assert 0 < _whole(disk) < 39
    _resize(disk, "8m")
    warm.train(tiny, *SAVING, output, AUTO, processes=processes)
    (resumed,) = disk.iterdir()
    tools["compare"](resumed, undisturbed("json", *SAVING, processes=processes))


def test_save_that_hits_the_file_size_limit_leaves_the_earlier_file_and_its_card(warm, make, tools):
    tiny = tools["plug_in"](make("json"), "small_files")
    run = warm.start(tiny, *SAVING)
    assert run.wait() == [2]
    assert "could not be saved" in run.text()
    assert _whole(tiny.output) == 5
