import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.conversation.decoding import PUBLISHED_CHAT
from minigpt4.serving.uploads import Limits

pytest.importorskip("gradio")

from minigpt4.serving.page import decoding, sliders


def test_the_sliders_start_as_the_published_demo():
    assert decoding(Limits(), *(slider.value for slider in sliders(Limits(), context=2048))) == PUBLISHED_CHAT


def test_temperature_0_is_the_most_likely_answer():
    assert not decoding(Limits(), 1, 0, 0.9, 20, 1.0).do_sample


def test_an_answer_may_take_half_of_a_small_context():
    tokens = next(slider for slider in sliders(Limits(), context=256) if slider.label == "Maximum of tokens")
    assert (tokens.maximum, tokens.value) == (128, 128)


@pytest.mark.parametrize("values", [(11, 1, 0.9, 20, 1.0), (1, 1, 0.9, 2000, 1.0), (0, 1, 0.9, 20, 1.0)])
def test_a_request_beyond_the_limits_is_refused(values):
    with pytest.raises(SampleError, match="at most 10 beams and 1024 tokens"):
        decoding(Limits(), *values)


def test_an_impossible_value_is_an_error():
    with pytest.raises(ConfigError, match="top_p"):
        decoding(Limits(), 1, 1, 0, 20, 1.0)
