"""Log lines of each rank, in processes of their own, for logging belongs to the process."""

import os
import pty
import re
import subprocess
import sys
import termios

SCRIPT = """
import logging
from minigpt4.common.logger import setup_logging
setup_logging({rank})
logging.info("number of trainable parameters: %d", 3149824)
logging.warning("slow disk")
logging.getLogger("minigpt4.anything").error("broken")
"""


def _stderr(rank: int) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(rank=rank)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_rank_0_logs_in_the_published_form():
    lines = _stderr(0)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[INFO\] number of trainable parameters: 3149824", lines[0]
    )
    assert [line.split("] ")[1] for line in lines[1:]] == ["slow disk", "broken"]


def test_other_ranks_log_warnings_and_errors_with_their_rank():
    lines = _stderr(3)
    assert [line.split(" ", 2)[2] for line in lines] == ["[WARNING] rank 3: slow disk", "[ERROR] rank 3: broken"]


BAR = """
import logging, sys
from minigpt4.common.logger import EpochView, setup_logging
setup_logging(0)
view = EpochView(0, 3, 0)
view.step()
logging.warning("in the middle")
view.step()
view.close()
"""


def test_log_line_does_not_tear_the_bar_apart():
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    subprocess.run([sys.executable, "-c", BAR], stdout=follower, stderr=follower, check=True)
    os.close(follower)
    text = os.read(leader, 1 << 16).decode()
    os.close(leader)
    line = next(line for line in text.split("\n") if "in the middle" in line)
    assert re.fullmatch(
        r"20[\d-]+ [\d:,]+ \[WARNING\] in the middle", line.strip().split("\r")[-1].removeprefix("\x1b[A")
    )
    assert "epoch 0" in text
