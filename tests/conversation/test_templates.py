"""Conversations and their templates: the published ones to the letter, that of training, those of tokenizers."""

import json

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.conversation import (
    IMAGE_MESSAGE,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    Conversation,
    SeparatorStyle,
    get_template,
    prompt_template_from_tokenizer,
)
from minigpt4.conversation.templates import TemplateConversation

QUESTIONS = ("What is the weather like in this picture?", "Are there any people, and what are they doing?")
FIRST_ANSWER = "It is a sunny day with a few clouds."
VICUNA = "###Human: {} ###Assistant: "


def talk(conversation, *said):
    """Questions and answers in turn; after a question the answer is open."""
    for number, text in enumerate(said):
        if number % 2:
            conversation.fill_answer(text)
        else:
            conversation.ask(text)
            conversation.open_answer()
    return conversation


def prompts_after(conversation, *steps):
    prompts = []
    for step in steps:
        step()
        prompts.append(conversation.get_prompt())
    return prompts


def texts(conversation):
    return [text for _, text in conversation.messages]


@pytest.fixture(params=["vicuna0", "llama2", "training"])
def template(request):
    return TemplateConversation(VICUNA, "###") if request.param == "training" else get_template(request.param)


# The published templates


@pytest.mark.parametrize("name", ["vicuna0", "llama2"])
def test_chat_meets_the_reference(golden, name):
    expected, conversation = golden["chat"][name], get_template(name)
    parts = (conversation.system, list(conversation.roles), conversation.sep, conversation.sep_style.name)
    assert parts == tuple(expected[key] for key in ("system", "roles", "sep", "sep_style"))
    prompts = prompts_after(
        conversation,
        conversation.add_image,
        lambda: conversation.ask(QUESTIONS[0]),
        conversation.open_answer,
        lambda: (conversation.fill_answer(FIRST_ANSWER), conversation.ask(QUESTIONS[1])),
        conversation.open_answer,
    )
    names = ("after_upload", "after_ask1", "turn1", "after_ask2", "turn2")
    assert prompts == [expected[f"prompt_{name}"] for name in names]
    conversation.fill_answer(expected["answer"]["text"])
    assert conversation.to_gradio_chatbot() == expected["to_gradio_chatbot"]
    conversation.fill_answer(expected["answer_stop2"]["text"])
    assert json.loads(json.dumps(conversation.dict())) == conversation.dict() == expected["dict"]


@pytest.mark.parametrize("name", ["vicuna0", "llama2", "minigptv2"])
def test_prompts_without_a_model_meet_the_reference(golden, name):
    section = golden["chat"]["string_only"]
    expected = {entry["template"]: entry["prompts"] for entry in section["templates"]}[name]
    conversation = get_template(name)
    prompts = prompts_after(
        conversation,
        lambda: None,
        lambda: conversation.ask("No image yet."),
        conversation.open_answer,
        lambda: conversation.fill_answer(""),
        lambda: conversation.fill_answer("Fine."),
        conversation.add_image,
        lambda: conversation.ask("And now?"),
        lambda: conversation.ask("And again?"),
    )
    assert prompts == expected


def test_two_separators_meet_the_reference_and_need_the_second(golden):
    case = golden["chat"]["string_only"]["sep_style_two"]
    parts = {"system": case["system"], "roles": tuple(case["roles"]), "sep_style": SeparatorStyle.TWO}
    conversation = Conversation(**parts, sep=case["sep"], sep2=case["sep2"])
    for role, text in case["messages"]:
        conversation.append_message(role, text)
    assert conversation.get_prompt() == case["prompt"]
    assert conversation.answer_end == case["sep2"]
    with pytest.raises(ValueError, match="needs sep2"):
        Conversation(**parts)


def test_lookup_gives_a_fresh_copy_and_names_what_there_is():
    for name, constant in {"vicuna0": CONV_VISION_Vicuna0, "minigptv2": CONV_VISION_minigptv2}.items():
        found = get_template(name)
        assert found == constant
        found.ask("Hello?")
        assert constant.messages == get_template(name).messages == []
    with pytest.raises(ConfigError, match=r"'vicuna'; did you mean 'vicuna0'\? Known: llama2, minigptv2, vicuna0"):
        get_template("vicuna")


# What is said


def test_a_question_joins_the_last_image_of_its_turn():
    conversation = get_template("vicuna0")
    conversation.add_image()
    conversation.open_answer()
    conversation.fill_answer("A boat.")
    talk(conversation, "What?", "</Img>", "And?")
    assert texts(conversation) == [IMAGE_MESSAGE, "A boat.", "What?", "</Img>", "And?", None]
    conversation = get_template("vicuna0")
    conversation.add_image()
    conversation.add_image()
    conversation.ask("What?")
    assert texts(conversation) == [IMAGE_MESSAGE, f"{IMAGE_MESSAGE} What?"]


def test_what_cannot_be_said_leaves_the_chat_alone():
    chat = get_template("vicuna0")
    for say in (chat.ask, chat.set_system):
        with pytest.raises(SampleError, match="must not hold <ImageHere>"):
            say("What is <ImageHere>?")
    with pytest.raises(ValueError, match="call open_answer"):
        chat.fill_answer("Hi.")
    assert chat == get_template("vicuna0")


# The template of training


def test_braces_stay_and_a_template_may_be_empty():
    assert talk(TemplateConversation(VICUNA, "###"), "{x}", "{}").get_prompt() == "###Human: {x} ###Assistant: {}###"
    assert talk(TemplateConversation("", "###"), "Hello").get_prompt() == "Hello"


def test_a_system_text_begins_the_first_instruction_only_also_when_the_oldest_turn_goes():
    conversation = TemplateConversation(VICUNA, "###")
    conversation.set_system("Be brief.")
    talk(conversation, "One", "A", "Two", "B", "Three")
    start = "###Human: Be brief. One ###Assistant: A######Human: Two ###Assistant: B###"
    assert conversation.get_prompt().startswith(start)
    assert conversation.copy().without_oldest(1).get_prompt().startswith("###Human: Be brief. Two ###Assistant: B###")


# What fits into the context


def turns(conversation, count, images=(0,)):
    """With one image before each of the turns `images`, whose last question is open."""
    for turn in range(count):
        if turn in images:
            conversation.add_image()
        talk(conversation, f"question {turn}", *[f"answer {turn}"] * (turn < count - 1))
    return conversation


def test_one_position_less_drops_the_oldest_turn_and_keeps_all_images(template):
    whole = turns(template, 3)
    room = len(whole.get_prompt()) + 10
    fitted, dropped = whole.fit(len, 10, room)
    assert (fitted.get_prompt(), dropped) == (whole.get_prompt(), 0)
    fitted, dropped = whole.fit(len, 10, room - 1)
    assert (texts(fitted), dropped) == ([f"{IMAGE_MESSAGE} question 1", "answer 1", "question 2", None], 1)
    assert len(whole.messages) == 6
    fitted = turns(get_template("vicuna0"), 4, images=(0, 1, 3)).without_oldest(3)
    assert texts(fitted) == [IMAGE_MESSAGE, IMAGE_MESSAGE, f"{IMAGE_MESSAGE} question 3", None]


def test_no_more_turns_go_than_must_and_few_prompts_are_tried(template):
    whole, asked = turns(template, 200), []
    room = len(whole.without_oldest(150).get_prompt())
    fitted, dropped = whole.fit(lambda prompt: asked.append(1) or len(prompt), 0, room)
    assert (dropped, len(fitted.get_prompt())) == (150, room)
    assert len(asked) < 12
    with pytest.raises(SampleError, match=r"may take 7, but this LLM reads 20 in all"):
        whole.fit(len, 7, 20)


# Taking back the last question


def test_taking_back_removes_one_turn_at_a_time_and_keeps_images(template):
    whole = turns(template, 3)
    assert [whole.take_back() for _ in range(4)] == ["question 2", "question 1", "question 0", None]
    assert texts(whole) == [IMAGE_MESSAGE]
    talk(whole, "Which colour?", "Red.")
    assert texts(whole) == [f"{IMAGE_MESSAGE} Which colour?", "Red."]
    whole.add_image()
    assert whole.take_back() == "Which colour?"
    assert texts(whole) == [IMAGE_MESSAGE, IMAGE_MESSAGE]
    whole.ask("What does </Img> mean?")
    assert whole.take_back() == "What does </Img> mean?"


# The chat template of a tokenizer, in ChatML's manner and in LLaMA-2's

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BRACKETS = "{% for message in messages %}{{ bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}{% endfor %}"


def template_of(chat_template, adds_bos=True):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "name_or_path": "models/tiny"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **tokens)
    return prompt_template_from_tokenizer(tokenizer)


def test_template_of_a_tokenizer_holds_the_instruction_and_leaves_bos_to_a_model_that_puts_it_there():
    assert template_of(CHATML) == "<|user|>\n{}<|end|>\n<|assistant|>\n"
    assert template_of(BRACKETS) == "[INST] {} [/INST]"
    assert template_of(BRACKETS, adds_bos=False) == "<s>[INST] {} [/INST]"
    assert template_of("{{ '{json: {}} ' }}" + CHATML).format("Hi.").startswith("{json: {}} <|user|>\nHi.")


@pytest.mark.parametrize(
    ("chat_template", "complaint"),
    [
        (None, "has no chat template; write model.prompt_template by hand"),
        (CHATML + CHATML, "holds the user's message 2 times, not once"),
        ("{{ raise_exception('too short') }}", "takes no instruction: too short"),
    ],
)
def test_chat_template_that_gives_none_is_refused_with_the_tokenizers_name(chat_template, complaint):
    with pytest.raises(ConfigError, match=f"'models/tiny' {complaint}"):
        template_of(chat_template)
