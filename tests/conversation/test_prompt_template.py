"""Turns in the template of training."""

import pytest

from minigpt4.conversation.templates import TemplateConversation

VICUNA = "###Human: {} ###Assistant: "


def talk(*said, template=VICUNA, end="###", system=None):
    """Questions and answers in turn; after a question the answer is open."""
    conversation = TemplateConversation(template, end)
    if system:
        conversation.set_system(system)
    for number, text in enumerate(said):
        if number % 2:
            conversation.fill_answer(text)
        else:
            conversation.ask(text)
            conversation.open_answer()
    return conversation


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        (("Hello", "Hi.", "Who?"), "###Human: Hello ###Assistant: Hi.######Human: Who? ###Assistant: "),
        (("{x}", "{}"), "###Human: {x} ###Assistant: {}###"),
    ],
)
def test_a_question_follows_the_ended_answer_and_braces_stay(said, prompt):
    assert talk(*said).get_prompt() == prompt


def test_an_empty_template_leaves_the_words_alone():
    assert talk("Hello", template="", end="\n").get_prompt() == "Hello"


def test_an_image_is_joined_by_its_question_and_a_copy_goes_on_by_itself():
    first = talk()
    first.add_image()
    first.ask("What is this?")
    twin = first.copy()
    twin.open_answer()
    twin.fill_answer("A dog.")
    assert first.get_prompt() == "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "
    assert [text for _, text in twin.messages] == ["<Img><ImageHere></Img> What is this?", "A dog."]


def test_a_system_text_begins_the_first_instruction_only_also_when_the_oldest_turn_goes():
    conversation = talk("One", "A", "Two", "B", "Three", system="Be brief.")
    assert conversation.get_prompt().startswith(
        "###Human: Be brief. One ###Assistant: A######Human: Two ###Assistant: B###"
    )
    assert conversation.copy().without_oldest(1).get_prompt().startswith("###Human: Be brief. Two ###Assistant: B###")
