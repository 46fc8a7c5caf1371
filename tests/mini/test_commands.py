import io
import os
import signal
import sys
import threading

import pytest

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.mini.quickstart import ANSWER_LINE, TRAIN_LINE, Progress, run_command


def test_the_lines_of_training_and_captioning_are_understood():
    train = TRAIN_LINE.search(
        "Train: data epoch: [3]  [ 50/500]  eta: 0:04:39  lr: 0.000008  loss: 2.8966  time: 0.4717  data: 0.0000"
    )
    assert (train["epoch"], train["it"], train["its"], train["loss"]) == ("3", "50", "500", "2.8966")
    caption = ANSWER_LINE.search("2026-11-21 12:01:22,331 [INFO] epoch 4: 100 answers in 13.6 s on this process")
    assert caption["name"] == "epoch 4"


def test_every_line_goes_to_the_log_and_to_the_listener(tmp_path):
    heard = []
    run_command([sys.executable, "-c", "print('one'); print('two')"], tmp_path / "logs" / "log.txt", heard.append)
    assert heard == ["one\n", "two\n"]
    assert (tmp_path / "logs" / "log.txt").read_text() == "one\ntwo\n"


def test_a_failure_shows_what_the_script_said_and_not_what_the_launcher_said(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\nprint('error: no such shard')\n"
        "print('E1121 12:01:39.373 22767 torch/distributed/elastic/multiprocessing/api.py:1002] failed')\nsys.exit(3)\n"
    )
    with pytest.raises(MiniGPT4Error) as error:
        run_command([sys.executable, str(script)], tmp_path / "log.txt")
    assert "error: no such shard" in str(error.value)
    assert "fails.py failed (exit 3)" in str(error.value)
    assert "elastic" not in str(error.value)


@pytest.fixture
def ctrl_c_interrupts():
    """As in a terminal; a process that was started in the background ignores Ctrl-C, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_asks_the_command_to_stop_and_waits_for_it(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(
        "import pathlib, signal, sys\n"
        "def stop(*_):\n    pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('ready', flush=True)\nsignal.pause()\n"
    )

    def interrupt(line: str) -> None:
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()

    with pytest.raises(KeyboardInterrupt):
        run_command([sys.executable, str(script), str(tmp_path / "state")], tmp_path / "log.txt", interrupt)
    assert (tmp_path / "state").read_text() == "saved"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_each_step_ends_with_a_line_of_its_own_and_a_file_is_not_flooded():
    out = io.StringIO()
    progress = Progress([10, 0, 30], out)
    progress.start("scenes")
    progress.finish("4 scenes")
    progress.start("stage 1", is_done=True)
    progress.start("stage 2")
    progress.finish()
    assert out.getvalue().splitlines() == [
        "[1/3] scenes ...",
        "[1/3] scenes: 4 scenes",
        "[2/3] stage 1: done before",
        "[3/3] stage 2 ...",
        "[3/3] stage 2: done",
    ]
    for step in range(100):
        progress.at(step / 100, f"{step}%")
    assert len(out.getvalue().splitlines()) <= 6


def test_a_terminal_shows_the_share_and_the_time_left_on_one_line():
    out = Terminal()
    progress = Progress([120, 120], out)
    progress.start("stage 1")
    progress.at(0.5, "50%, loss 1.0")
    progress.at(0.6, "60%")
    text = out.getvalue()
    assert "\r[1/2] stage 1: 50%, loss 1.0; about " in text
    assert text.rstrip().endswith("min left")
    assert "\n" not in text
