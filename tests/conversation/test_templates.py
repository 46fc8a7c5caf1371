"""The published templates, character by character, and what the small methods do to them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import minigpt4
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.conversation import (
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    Conversation,
    SeparatorStyle,
    get_template,
)

QUESTIONS = ("What is the weather like in this picture?", "Are there any people, and what are they doing?")
FIRST_ANSWER = "It is a sunny day with a few clouds."


def two_turns(name: str) -> Conversation:
    """The reference's chat up to the open second answer."""
    conversation = get_template(name)
    conversation.add_image()
    conversation.ask(QUESTIONS[0])
    conversation.open_answer()
    conversation.fill_answer(FIRST_ANSWER)
    conversation.ask(QUESTIONS[1])
    conversation.open_answer()
    return conversation


@pytest.mark.parametrize("name", ["vicuna0", "llama2"])
def test_template_has_the_published_parts(golden, name):
    expected, template = golden["chat"][name], get_template(name)
    assert template.system == expected["system"]
    assert list(template.roles) == expected["roles"]
    assert template.sep == expected["sep"]
    assert template.sep_style.name == expected["sep_style"]


@pytest.mark.parametrize("name", ["vicuna0", "llama2"])
def test_every_prompt_of_a_chat_meets_the_reference(golden, name):
    expected, conversation = golden["chat"][name], get_template(name)
    conversation.add_image()
    assert conversation.get_prompt() == expected["prompt_after_upload"]
    conversation.ask(QUESTIONS[0])
    assert conversation.messages == expected["messages_after_ask1"]
    assert conversation.get_prompt() == expected["prompt_after_ask1"]
    conversation.open_answer()
    assert conversation.get_prompt() == expected["prompt_turn1"]
    conversation.fill_answer(FIRST_ANSWER)
    conversation.ask(QUESTIONS[1])
    assert conversation.get_prompt() == expected["prompt_after_ask2"]
    conversation.open_answer()
    assert conversation.get_prompt() == expected["prompt_turn2"]


@pytest.mark.parametrize("name", ["vicuna0", "llama2"])
def test_gradio_pairs_meet_the_reference(golden, name):
    conversation = two_turns(name)
    conversation.fill_answer(golden["chat"][name]["answer"]["text"])
    assert conversation.to_gradio_chatbot() == golden["chat"][name]["to_gradio_chatbot"]


@pytest.mark.parametrize("name", ["vicuna0", "llama2"])
def test_dict_meets_the_reference(golden, name):
    conversation = two_turns(name)
    conversation.fill_answer(golden["chat"][name]["answer_stop2"]["text"])
    assert conversation.dict() == golden["chat"][name]["dict"]
    assert json.loads(json.dumps(conversation.dict())) == golden["chat"][name]["dict"]


@pytest.mark.parametrize("name", ["vicuna0", "llama2", "minigptv2"])
def test_prompts_without_a_model_meet_the_reference(golden, name):
    section = golden["chat"]["string_only"]
    expected = {entry["template"]: entry["prompts"] for entry in section["templates"]}[name]
    conversation = get_template(name)
    steps = [
        lambda: None,
        lambda: conversation.ask("No image yet."),
        conversation.open_answer,
        lambda: conversation.fill_answer(""),
        lambda: conversation.fill_answer("Fine."),
        conversation.add_image,
        lambda: conversation.ask("And now?"),
        lambda: conversation.ask("And again?"),
    ]
    prompts = []
    for step in steps:
        step()
        prompts.append(conversation.get_prompt())
    assert prompts == expected


def test_two_separators_meet_the_reference(golden):
    case = golden["chat"]["string_only"]["sep_style_two"]
    conversation = Conversation(
        system=case["system"],
        roles=tuple(case["roles"]),
        sep_style=SeparatorStyle.TWO,
        sep=case["sep"],
        sep2=case["sep2"],
    )
    for role, text in case["messages"]:
        conversation.append_message(role, text)
    assert conversation.get_prompt() == case["prompt"]
    assert conversation.answer_end == case["sep2"]


def test_two_separators_need_the_second():
    with pytest.raises(ValueError, match="needs sep2"):
        Conversation(system="", roles=("U: ", "A: "), sep_style=SeparatorStyle.TWO)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("vicuna0", CONV_VISION_Vicuna0),
        ("llama2", CONV_VISION_LLama2),
        ("minigptv2", CONV_VISION_minigptv2),
    ],
)
def test_lookup_gives_a_fresh_copy_of_the_published_constant(name, template):
    found = get_template(name)
    assert found == template
    found.ask("Hello?")
    assert template.messages == []
    assert get_template(name).messages == []


def test_unknown_template_lists_the_names():
    with pytest.raises(ConfigError, match=r"'vicuna'; did you mean 'vicuna0'\? Known: llama2, minigptv2, vicuna0"):
        get_template("vicuna")


def test_copy_goes_on_independently():
    original = two_turns("vicuna0")
    twin = original.copy()
    twin.fill_answer("Three people walk.")
    twin.ask("Sure?")
    assert original.messages[-1] == ["Assistant: ", None]


IMAGE = "<Img><ImageHere></Img>"


@pytest.mark.parametrize(
    ("shown", "answer", "texts"),
    [
        (1, "A boat.", [IMAGE, "A boat.", "What?"]),
        (2, None, [IMAGE, f"{IMAGE} What?"]),
        (0, "</Img>", ["</Img>", "What?"]),
    ],
    ids=["not one of an earlier turn", "only the last of two", "not an answer that ends like one"],
)
def test_a_question_joins_the_image_before_it(shown, answer, texts):
    conversation = get_template("vicuna0")
    for _ in range(shown):
        conversation.add_image()
    if answer:
        conversation.open_answer()
        conversation.fill_answer(answer)
    conversation.ask("What?")
    assert [text for _, text in conversation.messages] == texts


def test_question_with_an_image_placeholder_is_refused_and_leaves_the_chat_alone():
    conversation = get_template("vicuna0")
    with pytest.raises(SampleError, match="must not hold <ImageHere>"):
        conversation.ask("What is <ImageHere>?")
    assert conversation.messages == []


@pytest.mark.parametrize("said", [[], ["Hello?"]])
def test_filling_an_answer_nobody_opened_is_an_error(said):
    conversation = get_template("vicuna0")
    for text in said:
        conversation.ask(text)
    with pytest.raises(ValueError, match="call open_answer"):
        conversation.fill_answer("Hi.")


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("vicuna0", "Assistant:", "###"), ("llama2", "[/INST]", ""), ("minigptv2", "[/INST]", "")],
)
def test_answer_marks_follow_the_template(name, start, end):
    assert (get_template(name).answer_start, get_template(name).answer_end) == (start, end)


def test_importing_the_package_needs_neither_torch_nor_transformers():
    code = "import sys, minigpt4.conversation; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    root = Path(minigpt4.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_system_text_replaces_that_of_the_template():
    chat = get_template("vicuna0")
    chat.set_system("Be brief.")
    chat.ask("Hello")
    assert chat.get_prompt() == "Be brief.###Human: Hello###"
    assert get_template("vicuna0").system.startswith("Give the following image")


def test_a_system_text_with_an_image_placeholder_is_refused():
    chat = get_template("vicuna0")
    with pytest.raises(SampleError, match="ImageHere"):
        chat.set_system("Look at <ImageHere>.")
    assert chat.system == get_template("vicuna0").system
