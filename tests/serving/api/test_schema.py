"""From the fields of a request to the model's template and to decoding."""

from dataclasses import replace

import pytest

from minigpt4.conversation.decoding import GREEDY, PUBLISHED_CHAT, Decoding
from minigpt4.conversation.templates import TemplateConversation, get_template
from minigpt4.serving.api.access import ApiLimits
from minigpt4.serving.api.schema import ChatRequest, decoded

IMAGE = "<Img><ImageHere></Img>"
URL = "data:image/png;base64,"


def training():
    return TemplateConversation("###Human: {} ###Assistant: ", "###")


def vicuna():
    return get_template("vicuna0")


def request(*messages, **fields):
    said = [{"role": role, "content": content} for role, content in messages or [("user", "a")]]
    return ChatRequest.model_validate({"model": "m", "messages": said} | fields)


def image(name):
    return {"type": "image_url", "image_url": {"url": URL + name}}


def said(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([image("a"), said("What?")], f"{IMAGE} What?"),
        ([said("This:"), image("a"), said(" and "), image("b"), said("?")], f"This: {IMAGE} and {IMAGE} ?"),
        ([image("a"), image("b")], f"{IMAGE} {IMAGE}"),
        ([said("One."), said("Two.")], "One.\nTwo."),
        ([said(" "), image("a"), said("")], IMAGE),
    ],
)
def test_parts_become_one_message_in_their_order(parts, text):
    asked = request(("user", parts))
    assert asked.conversation(training).get_prompt() == f"###Human: {text} ###Assistant: "
    assert [url for _, url in asked.images()] == [part["image_url"]["url"] for part in parts if "image_url" in part]


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        (
            training,
            [("user", [image("a")]), ("user", "What?"), ("assistant", "A"), ("assistant", "dog."), ("user", "Sure?")],
            f"###Human: {IMAGE}\nWhat? ###Assistant: A\ndog.######Human: Sure? ###Assistant: ",
        ),
        (
            training,
            [("user", "What?"), ("assistant", ""), ("user", "Say!")],
            "###Human: What?\nSay! ###Assistant: ",
        ),
        (
            vicuna,
            [("system", "Be brief."), ("developer", "Be kind."), ("assistant", "Hello!"), ("user", "Hi")],
            "Be brief.\nBe kind.###Assistant: Hello!###Human: Hi###Assistant: ",
        ),
        (vicuna, [("user", "Hi")], f"{get_template('vicuna0').system}###Human: Hi###Assistant: "),
    ],
    ids=["roles in a row are joined", "an empty answer is left out", "system texts", "the template's own system text"],
)
def test_messages_in_the_models_template(template, messages, prompt):
    assert request(*messages).conversation(template).get_prompt() == prompt


def test_data_urls_as_clients_write_them():
    urls = [f"{URL}aGVsbG8{end}" for end in ("=", "", "=\n")]
    urls += [f"data:{kind};base64,aGVs\r\nbG8=" for kind in ("image/jpg", "application/octet-stream", "")]
    for url in urls:
        asked = request(("user", [{"type": "image_url", "image_url": {"url": url}}]))
        assert [decoded(own, ApiLimits()) for _, own in asked.images()] == [b"hello"]


WARM = {"temperature": 0.5, "top_p": 0.2, "repetition_penalty": 2, "num_beams": 4}


@pytest.mark.parametrize(
    ("fields", "decoding"),
    [
        ({}, PUBLISHED_CHAT),
        ({"temperature": None, "top_p": None, "max_tokens": None, "num_beams": None}, PUBLISHED_CHAT),
        *(({"temperature": cold, "repetition_penalty": 1}, GREEDY) for cold in (0, 1e-30, 0.009)),
        (WARM | {"max_completion_tokens": 7}, Decoding(**WARM, max_new_tokens=7, do_sample=True)),
        ({"max_tokens": 7, "temperature": 0, "repetition_penalty": 1}, replace(GREEDY, max_new_tokens=7)),
    ],
)
def test_every_field_has_its_effect_and_none_is_the_published_chat(fields, decoding):
    assert request(**fields).decoding(ApiLimits()) == decoding
    assert request().decoding(ApiLimits(new_tokens=50)).max_new_tokens == 50
