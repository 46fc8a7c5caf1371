"""What a request says about decoding, and what is done where it says nothing."""

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.decoding import PUBLISHED_CHAT, Decoding
from minigpt4.serving.api.access import ApiLimits
from minigpt4.serving.api.schema import ChatRequest, read_decoding


def decoding(limits=None, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]} | fields
    return read_decoding(ChatRequest.model_validate(body), limits or ApiLimits())


def test_who_says_nothing_gets_the_published_chat():
    assert decoding() == PUBLISHED_CHAT
    assert decoding(temperature=None, top_p=None, max_tokens=None, num_beams=None) == PUBLISHED_CHAT


@pytest.mark.parametrize("temperature", [0, 1e-30, 0.009])
def test_cold_is_greedy(temperature):
    chosen = decoding(temperature=temperature, repetition_penalty=1)
    assert chosen == Decoding(max_new_tokens=300, top_p=0.9)


def test_every_field_has_its_effect():
    chosen = decoding(temperature=0.5, top_p=0.2, repetition_penalty=2, num_beams=4, max_completion_tokens=7)
    assert chosen == Decoding(4, 7, top_p=0.2, repetition_penalty=2, temperature=0.5, do_sample=True)
    assert decoding(max_tokens=7).max_new_tokens == 7


def test_the_default_length_keeps_to_the_limit():
    assert decoding(ApiLimits(new_tokens=50)).max_new_tokens == 50


def test_limits_are_changed_by_name():
    limits = ApiLimits.changed(["images=2", "seconds=1.5", "image_bytes=50_000_000"])
    assert (limits.images, limits.seconds, limits.image_bytes) == (2, 1.5, 50_000_000)
    assert limits.body_bytes == ApiLimits().body_bytes


@pytest.mark.parametrize(
    ("text", "reason"),
    [("image=2", "did you mean 'images'"), ("images=two", "no int"), ("seconds", "no float"), ("images=0", "above 0")],
)
def test_a_wrong_limit_is_an_error(text, reason):
    with pytest.raises(ConfigError, match=reason):
        ApiLimits.changed([text])
