"""`bash quickstart.sh --fast`, from beginning to end, stopped once on the way."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.mini.quickstart import ANSWER_LINE, TRAIN_LINE

REPOSITORY = Path(__file__).parents[2]
NEEDED = (
    *("minigpt4", "train_configs", "eval_configs", "eval_scripts", "prompts"),
    *("train.py", "prepare_flickr30k.py", "quickstart.sh"),
)
ROWS = ["pretrained", *(f"epoch {number}" for number in range(2))]

pytestmark = pytest.mark.timeout(1800)


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # children inherit only that it is ignored
    try:
        return subprocess.Popen(["bash", "quickstart.sh", "--fast"], cwd=folder, env=environment, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and content of everything that was written."""
    found = [f for top in ("data", "output") for f in sorted((folder / top).rglob("*")) if f.is_file()]
    return {str(f): (f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest()) for f in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, language_model):
    """A checkout with the language model, but without other data and output."""
    place = tmp_path_factory.mktemp("checkout")
    for name in NEEDED:
        (place / name).symlink_to(REPOSITORY / name)
    (place / "data/mini").mkdir(parents=True)
    (place / "data/mini/smollm2-135m-instruct").symlink_to(language_model)
    return place


@pytest.fixture(scope="module")
def stopped(folder):
    """What was said by a quickstart that Ctrl-C ended in stage 1, and its exit status."""
    process = start(folder)
    said = []
    for line in process.stdout:
        said.append(line)
        if "stage 1" in line and "loss" in line:
            process.send_signal(signal.SIGINT)
            break
    said.append(process.communicate(timeout=120)[0])
    return "".join(said), process.returncode


@pytest.fixture(scope="module")
def finished(folder, stopped):
    """What was said by the quickstart that went on from there."""
    process = start(folder)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, said
    return said


def test_ctrl_c_stops_with_a_word_and_keeps_what_was_trained(stopped, folder):
    said, status = stopped
    assert status == 130, said
    assert "The same command resumes" in said
    assert "it/s" not in said  # no bars of others
    assert list((folder / "output/mini/fast/stage1").glob("*/checkpoint_iter_*.pth"))


def test_the_same_command_goes_on_in_the_middle_of_a_stage(finished, folder):
    assert "drawn before" in finished
    assert "data/mini/smollm2-135m-instruct, written before" in finished
    log = (folder / "output/mini/fast/logs/stage1.txt").read_text()
    assert "Resum" in log or "Going on" in log
    assert len(list((folder / "output/mini/fast/stage1").iterdir())) == 1


@pytest.mark.parametrize("recipe", ["stage1", "stage2", "flickr30k"])
def test_losses_fall(finished, folder, recipe):
    (metrics,) = (folder / "output/mini/fast" / recipe).glob("*/metrics.jsonl")
    losses = [record["loss"] for line in metrics.read_text().splitlines() if "loss" in (record := json.loads(line))]
    third = max(1, len(losses) // 3)
    assert sum(losses[-third:]) / third < sum(losses[:third]) / third


def test_progress_finds_its_lines_in_the_logs(finished, folder):
    logs = folder / "output/mini/fast/logs"
    answers = [match["name"] for line in (logs / "evaluation.txt").open() if (match := ANSWER_LINE.search(line))]
    assert answers == ROWS
    assert TRAIN_LINE.search((logs / "flickr30k.txt").read_text())["its"] == "3"


def test_the_report_is_complete(finished, folder):
    output = folder / "output/mini/fast"
    report = json.loads((output / "report.json").read_text())
    assert list(report["measures"]) == list(report["scores"]) == ROWS
    assert all(0 <= value <= 1 for value in report["measures"]["epoch 1"].values() if value == value)
    assert set(report["looks"]) == {"cider", "cider_shuffled", "lost"}
    text = (output / "report.txt").read_text()
    assert text in finished
    assert all(f"| {name} |" in text for name in ROWS)
    assert "BLEU-4" in text
    with Image.open(output / "scenes.png") as figure:
        assert figure.width > 600
    for file in ("metrics.png", "metrics.csv", "report.html", "captions_pretrained.json", "captions_epoch_1.json"):
        assert (output / "evaluation" / file).stat().st_size > 0


def test_a_second_run_changes_nothing(finished, folder):
    before = files(folder)
    process = start(folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("done before") == 5
    assert files(folder) == before
