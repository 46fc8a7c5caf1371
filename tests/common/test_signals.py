"""Asking a run to stop by a signal."""

import os
import signal

import pytest

from minigpt4.common.dist_utils import SAVE_AND_STOP, StopRequest


@pytest.mark.parametrize("number", SAVE_AND_STOP)
def test_signal_sets_the_flag_and_its_name(number):
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
    assert stop.name == number.name


def test_second_ctrl_c_interrupts():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_after_another_signal_does_not_interrupt():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"


def test_second_sigterm_is_remembered_only():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"


def _handlers() -> list:
    return [signal.getsignal(number) for number in SAVE_AND_STOP]


def test_handlers_are_restored():
    before = _handlers()
    with StopRequest():
        assert not set(_handlers()) & set(before)
    assert _handlers() == before


def test_handlers_are_restored_after_an_error():
    before = _handlers()
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert _handlers() == before
