"""What the quickstart says of its steps and of a command that failed; test_quickstart.py has the rest."""

import io
import sys

import pytest

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.mini.quickstart import Progress, run_command


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
