"""The clock of a start: phases add up, inner ones count once, and nothing happens where no clock runs."""

import subprocess
import sys
import time

import pytest

from minigpt4.common import start_clock
from minigpt4.common.start_clock import DATA, FIRST_STEP, LLM, PHASES, VISION, finish, not_needed, phase

PAUSE = 0.02


@pytest.fixture(autouse=True)
def clock():
    start_clock.begin()
    yield
    finish()


def test_parts_add_up_and_an_inner_phase_is_counted_once():
    for _ in range(2):
        with phase(FIRST_STEP), phase(VISION):
            time.sleep(PAUSE)
    seconds = finish().seconds
    assert seconds[VISION] >= 2 * PAUSE
    assert seconds[FIRST_STEP] < PAUSE


def test_a_function_can_be_a_phase_and_its_error_passes():
    @phase(LLM)
    def load():
        raise RuntimeError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):
        load()
    assert LLM in finish().seconds


def test_line_names_every_phase_in_order_and_why_one_was_not_needed():
    not_needed(DATA, "nothing")
    with phase(DATA):  # it was, after all
        pass
    not_needed(VISION, "cache")
    line = str(finish())
    places = [line.index(f" {name} ") for name in PHASES]
    assert places == sorted(places)
    assert line.startswith("Start-up took ")
    assert f"{DATA} 0.0, {LLM} none, {VISION} not needed: cache, " in line
    assert finish() is None


def test_time_before_the_clock_began_counts_as_imports():
    code = (
        f"import time; time.sleep({10 * PAUSE}); from minigpt4.common import start_clock as c; c.begin(); "
        "print(c.finish().seconds['imports'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) >= 9 * PAUSE  # the system counts in hundredths of a second
