"""Log lines of each rank, in processes of their own, for logging belongs to the process."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

SCRIPT = """
import logging
from minigpt4.common.logger import setup_logging
setup_logging({rank})
logging.info("number of trainable parameters: %d", 3149824)
logging.warning("slow disk")
logging.getLogger("minigpt4.anything").error("broken")
"""
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
PUBLISHED = ["[INFO] number of trainable parameters: 3149824", "[WARNING] slow disk", "[ERROR] broken"]


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, PUBLISHED), (3, ["[WARNING] rank 3: slow disk", "[ERROR] rank 3: broken"])]
)
def test_rank_0_logs_in_the_published_form_and_others_their_warnings_with_their_rank(rank, expected):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(rank=rank)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [re.sub(f"^{STAMP}", "", line) for line in done.stderr.splitlines()] == expected


BAR = """
import logging
from tqdm import tqdm
from minigpt4.common.logger import setup_logging
setup_logging(0)
with tqdm(total=3, desc="epoch 0", dynamic_ncols=True) as bar:
    bar.update()
    logging.warning("in the middle")
    bar.update()
"""


def test_log_line_does_not_tear_the_bar_apart():
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    subprocess.run([sys.executable, "-c", BAR], stdout=follower, stderr=follower, check=True)
    os.close(follower)
    text = os.read(leader, 1 << 16).decode()
    os.close(leader)
    line = next(line for line in text.split("\n") if "in the middle" in line)
    assert re.fullmatch(STAMP + r"\[WARNING\] in the middle", line.strip().split("\r")[-1].removeprefix("\x1b[A"))
    assert "epoch 0" in text
