"""Ranges of `run.generation`."""

import pytest

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError
from minigpt4.common.schemas import RunConfig


def _bind(**generation) -> RunConfig:
    return bind(RunConfig, {"generation": generation}, section="run", source="eval.yaml")


def test_default_is_greedy_and_as_long_as_training_allows():
    settings = bind(RunConfig, {}, section="run", source="eval.yaml").generation
    assert (settings.num_beams, settings.do_sample, settings.max_new_tokens) == (1, False, 160)
    assert (settings.prompt, settings.stop) == (None, None)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"num_beams": 0}, "run.generation.num_beams: 0 must be at least 1"),
        ({"max_new_tokens": 0}, "run.generation.max_new_tokens: 0 must be at least 1"),
        ({"min_length": -1}, "run.generation.min_length: -1 must be at least 0"),
        ({"top_p": 0}, "run.generation.top_p: 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "run.generation.top_p: 1.1 must be above 0 and at most 1"),
        ({"temperature": 0}, "run.generation.temperature: 0.0 must be above 0"),
        ({"repetition_penalty": -2}, "run.generation.repetition_penalty: -2.0 must be above 0"),
        ({"stop": [""]}, "run.generation.stop: [''] must be a list of strings of which none is empty"),
        ({"do_sample": "yes"}, "run.generation.do_sample: 'yes' must be true or false"),
        ({"beams": 5}, "run.generation.beams: unknown key"),
    ],
)
def test_wrong_values_are_named(values, complaint):
    with pytest.raises(ConfigError) as caught:
        _bind(**values)
    assert complaint in str(caught.value)
