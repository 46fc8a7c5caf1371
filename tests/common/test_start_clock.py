"""The clock of a start: phases add up, inner ones count once, and nothing happens where no clock runs."""

import subprocess
import sys
import time

import pytest

from minigpt4.common import start_clock
from minigpt4.common.start_clock import DATA, FIRST_STEP, IMPORTS, LLM, PHASES, VISION, finish, not_needed, phase

PAUSE = 0.02


@pytest.fixture(autouse=True)
def clock():
    start_clock.begin()
    yield
    finish()


def test_parts_of_a_phase_are_added_up():
    for _ in range(2):
        with phase(DATA):
            time.sleep(PAUSE)
    assert finish().seconds[DATA] >= 2 * PAUSE


def test_what_an_inner_phase_takes_is_not_counted_twice():
    with phase(FIRST_STEP), phase(VISION):
        time.sleep(PAUSE)
    start = finish()
    assert start.seconds[VISION] >= PAUSE
    assert start.seconds[FIRST_STEP] < PAUSE
    assert sum(start.seconds.values()) <= start.total


def test_a_function_can_be_a_phase_and_its_error_passes():
    @phase(LLM)
    def load():
        time.sleep(PAUSE)
        raise RuntimeError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):
        load()
    assert finish().seconds[LLM] >= PAUSE


def test_line_names_every_phase_in_order():
    with phase(DATA):
        pass
    not_needed(VISION, "cache")
    line = finish().line()
    places = [line.index(f" {name} ") for name in PHASES]
    assert places == sorted(places)
    assert line.startswith("Start-up took ")
    assert f"{DATA} 0.0, {LLM} none, {VISION} not needed: cache, " in line


def test_phase_that_comes_after_all_was_needed():
    not_needed(VISION, "cache")
    with phase(VISION):
        pass
    start = finish()
    assert start.notes == {}
    assert VISION in start.seconds


def test_nothing_is_measured_without_a_clock_or_after_its_end():
    assert finish() is not None
    with phase(DATA):
        not_needed(VISION, "cache")
    assert finish() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process began")
def test_time_before_the_clock_began_counts_as_imports():
    code = (
        f"import time; time.sleep({10 * PAUSE}); from minigpt4.common import start_clock as c; c.begin(); "
        "print(c.finish().facts()['imports'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) >= 9 * PAUSE  # the system counts in hundredths of a second
    assert set(finish().facts()) == {"total", IMPORTS}
