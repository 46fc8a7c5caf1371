"""Generated text becomes the answer that the reference shows."""

import pytest
from sentencepiece import SentencePieceProcessor

from minigpt4.conversation import clean_answer, clean_generated, get_template


@pytest.fixture(scope="module")
def decode(parity_dir):
    """Ids to text as the tokenizer of the fixtures does, special pieces skipped."""
    processor = SentencePieceProcessor(model_file=str(parity_dir / "vicuna_tiny" / "tokenizer.model"))
    special = {processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.piece_to_id("$$")}
    return lambda ids: processor.decode([index for index in ids if index not in special])


def test_generated_answers_meet_the_reference(golden, decode):
    cases = golden["generate"]["cases"]
    answers = [[clean_generated(decode(ids)) for ids in case["output_ids"]] for case in cases]
    assert answers == [case["answers"] for case in cases]


@pytest.mark.parametrize("answer", ["answer", "answer_stop1", "answer_stop2"])
@pytest.mark.parametrize("name", ["vicuna0", "llama2"])
def test_chat_answers_meet_the_reference(golden, decode, name, answer):
    expected, template = golden["chat"][name][answer], get_template(name)
    text = clean_answer(decode(expected["ids"]), end=template.answer_end, start=template.answer_start)
    assert text == expected["text"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a boat</s> and more</s>", "a boat"),
        ("<s> a <s>boat", "a boat"),
        ("[INST] What? [/INST] no [/INST]\n a boat \n", "a boat"),
        ("a [/INST] boat</s> [/INST] ship", "boat"),
        ("a ### boat", "a ### boat"),
        ("", ""),
    ],
)
def test_generated_text_is_cleaned(text, expected):
    assert clean_generated(text) == expected


def test_generated_text_ends_at_the_first_stop_string():
    assert clean_generated("one ### two </s> three END", ["END", "###", "none"]) == "one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A boat.###Human: And?###", "A boat."),
        ("Human: What?\nAssistant: A boat.\n", "A boat."),
        ("Assistant: no Assistant: A boat.", "A boat."),
        ("A boat.###Assistant: no", "A boat."),
        ("### A boat.", ""),
        ("", ""),
    ],
)
def test_chat_text_is_cleaned_by_vicunas_marks_unless_told_otherwise(text, expected):
    assert clean_answer(text) == expected


def test_other_templates_keep_what_only_vicuna_cuts():
    template = get_template("llama2")
    text = "[INST] What? [/INST] A list: ### one"
    assert clean_answer(text, template.answer_end, template.answer_start) == "A list: ### one"
