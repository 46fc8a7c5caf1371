"""Prompts by the chat template of a real tokenizer, one in ChatML's manner and one in LLaMA-2's."""

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from minigpt4.common.errors import ConfigError
from minigpt4.conversation import TokenizerConversation, prompt_template_from_tokenizer

CHATML = (
    "{% for message in messages %}"
    "<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Like LLaMA-2's own: bos before each turn, turns must alternate, contents are trimmed.
BRACKETS = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('this model knows no system role') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def make_tokenizer(chat_template: str | None, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        name_or_path="models/tiny",
        chat_template=chat_template,
    )


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def brackets() -> PreTrainedTokenizerFast:
    return make_tokenizer(BRACKETS)


def asked(tokenizer: PreTrainedTokenizerFast, system: str | None = None) -> TokenizerConversation:
    """An image and a question, the answer open."""
    conversation = TokenizerConversation(tokenizer, system)
    conversation.add_image()
    conversation.ask("What is this?")
    conversation.open_answer()
    return conversation


def test_image_and_question_stand_in_one_user_message(chatml):
    expected = "<|user|>\n<Img><ImageHere></Img> What is this?<|end|>\n<|assistant|>\n"
    assert asked(chatml).get_prompt() == expected


def test_system_text_comes_first(chatml):
    assert asked(chatml, "Be brief.").get_prompt().startswith("<|system|>\nBe brief.<|end|>\n<|user|>\n")


def test_second_turn_holds_the_first(chatml):
    conversation = asked(chatml)
    first = conversation.get_prompt()
    conversation.fill_answer("A boat.")
    conversation.ask("Which colour?")
    conversation.open_answer()
    assert conversation.get_prompt() == (first + "A boat.<|end|>\n<|user|>\nWhich colour?<|end|>\n<|assistant|>\n")


@pytest.mark.parametrize("last", ["question", "answer"])
def test_prompt_asks_for_an_answer_only_when_one_is_open(chatml, last):
    conversation = asked(chatml)
    conversation.fill_answer("A boat.")
    if last == "question":
        conversation.ask("Which colour?")
    assert not conversation.get_prompt().endswith("<|assistant|>\n")


def test_leading_bos_is_left_to_the_model(brackets):
    assert asked(brackets).get_prompt() == "[INST] <Img><ImageHere></Img> What is this? [/INST]"


def test_leading_bos_stays_where_the_tokenizer_adds_none():
    tokenizer = make_tokenizer(BRACKETS, adds_bos=False)
    assert asked(tokenizer).get_prompt() == "<s>[INST] <Img><ImageHere></Img> What is this? [/INST]"


def test_bos_inside_the_prompt_stays(brackets):
    conversation = asked(brackets)
    conversation.fill_answer("A boat.")
    conversation.ask("Which colour?")
    conversation.open_answer()
    assert conversation.get_prompt() == (
        "[INST] <Img><ImageHere></Img> What is this? [/INST] A boat. </s><s>[INST] Which colour? [/INST]"
    )


def test_messages_in_a_row_are_one_for_the_template(brackets):
    conversation = TokenizerConversation(brackets)
    conversation.add_image()
    conversation.add_image()
    conversation.ask("Which is older?")
    conversation.ask("And why?")
    conversation.open_answer()
    assert conversation.get_prompt() == (
        "[INST] <Img><ImageHere></Img> <Img><ImageHere></Img> Which is older? And why? [/INST]"
    )


def test_empty_conversation_is_an_empty_prompt(chatml):
    assert TokenizerConversation(chatml).get_prompt() == ""


def test_what_the_template_refuses_is_a_clear_error(brackets):
    with pytest.raises(ConfigError, match="refuses this conversation: this model knows no system role"):
        asked(brackets, system="Be brief.").get_prompt()


@pytest.mark.parametrize("build", [TokenizerConversation, prompt_template_from_tokenizer])
def test_tokenizer_without_a_chat_template_is_refused(build):
    with pytest.raises(ConfigError, match="'models/tiny' has no chat template; choose a conversation template by name"):
        build(make_tokenizer(None))


def test_gradio_pairs_start_at_the_first_turn(chatml):
    conversation = asked(chatml)
    conversation.fill_answer("A boat.")
    assert conversation.to_gradio_chatbot() == [["<Img><ImageHere></Img> What is this?", "A boat."]]


def test_prompt_template_filled_in_is_the_prompt_of_the_conversation(chatml, brackets):
    for tokenizer in (chatml, brackets):
        template = prompt_template_from_tokenizer(tokenizer)
        instruction = "<Img><ImageHere></Img> What is this?"
        assert template.format(instruction) == asked(tokenizer).get_prompt()


def test_prompt_template_can_hold_a_system_text(chatml):
    template = prompt_template_from_tokenizer(chatml, system="Be brief.")
    assert template == "<|system|>\nBe brief.<|end|>\n<|user|>\n{}<|end|>\n<|assistant|>\n"


def test_braces_of_the_chat_template_survive_formatting():
    tokenizer = make_tokenizer("{{ '{json: {}} ' }}" + CHATML)
    assert prompt_template_from_tokenizer(tokenizer).format("Hi.").startswith("{json: {}} <|user|>\nHi.")


def test_prompt_template_refuses_a_chat_template_that_repeats_the_user():
    with pytest.raises(ConfigError, match="holds the user's message 2 times, not once"):
        prompt_template_from_tokenizer(make_tokenizer(CHATML + CHATML))
