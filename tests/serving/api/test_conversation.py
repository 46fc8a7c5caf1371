"""From messages to the model's template."""

import pytest

from minigpt4.conversation.templates import TemplateConversation, get_template
from minigpt4.serving.api.access import ApiLimits
from minigpt4.serving.api.schema import ChatRequest, read_conversation

IMAGE = "<Img><ImageHere></Img>"


def training():
    return TemplateConversation("###Human: {} ###Assistant: ", "###")


def read(*messages, template=training):
    body = {"model": "m", "messages": [{"role": role, "content": content} for role, content in messages]}
    return read_conversation(ChatRequest.model_validate(body), template, ApiLimits())


def image(name):
    return {"type": "image_url", "image_url": {"url": name}}


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
    talk = read(("user", parts))
    assert talk.conversation.get_prompt() == f"###Human: {text} ###Assistant: "
    assert [one.url for one in talk.images] == [part["image_url"]["url"] for part in parts if "image_url" in part]


def test_images_are_known_by_their_place():
    talk = read(("user", [image("a")]), ("assistant", "A dog."), ("user", [said("And"), image("b")]))
    assert [one.field for one in talk.images] == [
        "messages[0].content[0].image_url.url",
        "messages[2].content[1].image_url.url",
    ]


def test_messages_of_one_side_in_a_row_are_one():
    talk = read(("user", [image("a")]), ("user", "What?"), ("assistant", "A"), ("assistant", "dog."), ("user", "Sure?"))
    prompt = talk.conversation.get_prompt()
    assert prompt == f"###Human: {IMAGE}\nWhat? ###Assistant: A\ndog.######Human: Sure? ###Assistant: "


def test_an_assistant_that_said_nothing_is_left_out():
    talk = read(("user", "What?"), ("assistant", ""), ("user", "Say!"))
    assert talk.conversation.get_prompt() == "###Human: What?\nSay! ###Assistant: "


def test_system_and_developer_texts_stand_where_the_template_has_its_own():
    talk = read(
        ("system", "Be brief."), ("developer", "Be kind."), ("user", "Hi"), template=lambda: get_template("vicuna0")
    )
    assert talk.conversation.get_prompt() == "Be brief.\nBe kind.###Human: Hi###Assistant: "


def test_without_a_system_message_the_templates_own_text_stays():
    talk = read(("user", "Hi"), template=lambda: get_template("vicuna0"))
    assert talk.conversation.get_prompt().startswith("Give the following image")


def test_an_assistant_may_begin():
    talk = read(("assistant", "Hello!"), ("user", "Hi"), template=lambda: get_template("vicuna0"))
    assert talk.conversation.get_prompt().endswith("###Assistant: Hello!###Human: Hi###Assistant: ")
