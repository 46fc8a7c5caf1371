"""Asking a run to stop by a signal."""

import signal

import pytest

from minigpt4.common.dist_utils import SAVE_AND_STOP, StopRequest


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        *(([number], number.name) for number in SAVE_AND_STOP),
        ([signal.SIGTERM, signal.SIGINT], "SIGINT"),
        ([signal.SIGTERM, signal.SIGTERM], "SIGTERM"),
    ],
)
def test_signals_set_the_flag_and_its_name(numbers, name):
    with StopRequest() as stop:
        assert not stop
        for number in numbers:
            signal.raise_signal(number)
        assert stop
    assert stop.name == name


def test_second_ctrl_c_interrupts_and_handlers_are_restored():
    def handlers():
        return [signal.getsignal(number) for number in SAVE_AND_STOP]

    def twice():
        with StopRequest():
            assert not set(handlers()) & set(before)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        twice()
    assert handlers() == before
