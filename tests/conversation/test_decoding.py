"""Generated text becomes the answer that the reference shows, whole or piece by piece."""

import pytest
from sentencepiece import SentencePieceProcessor

from minigpt4.conversation import clean_answer, clean_generated, get_template
from minigpt4.conversation.decoding import TextStream


@pytest.fixture(scope="module")
def decode(parity_dir):
    """Ids to text as the tokenizer of the fixtures does, special pieces skipped."""
    processor = SentencePieceProcessor(model_file=str(parity_dir / "vicuna_tiny" / "tokenizer.model"))
    special = {processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.piece_to_id("$$")}
    return lambda ids: processor.decode([index for index in ids if index not in special])


def test_answers_meet_the_reference(golden, decode):
    for case in golden["generate"]["cases"]:
        assert [clean_generated(decode(ids)) for ids in case["output_ids"]] == case["answers"]
    for name in ("vicuna0", "llama2"):
        template = get_template(name)
        for kind in ("answer", "answer_stop1", "answer_stop2"):
            expected = golden["chat"][name][kind]
            assert clean_answer(decode(expected["ids"]), template.answer_end, template.answer_start) == expected["text"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a boat</s> and more</s>", [], "a boat"),
        ("<s> a <s>boat", [], "a boat"),
        ("[INST] What? [/INST] no [/INST]\n a boat \n", [], "a boat"),
        ("a [/INST] boat</s> [/INST] ship", [], "boat"),
        ("a ### boat", [], "a ### boat"),
        ("one ### two </s> three END", ["END", "###", "none"], "one"),
        ("", [], ""),
    ],
)
def test_generated_text_is_cleaned(text, stop, expected):
    assert clean_generated(text, stop) == expected


@pytest.mark.parametrize(
    ("text", "marks", "expected"),
    [
        ("A boat.###Human: And?###", (), "A boat."),
        ("Human: What?\nAssistant: A boat.\n", (), "A boat."),
        ("Assistant: no Assistant: A boat.", (), "A boat."),
        ("A boat.###Assistant: no", (), "A boat."),
        ("### A boat.", (), ""),
        ("[INST] What? [/INST] A list: ### one", ("", "[/INST]"), "A list: ### one"),
        ("The assistant holds ### a boat.", ("", ""), "The assistant holds ### a boat."),
    ],
)
def test_chat_text_is_cleaned_by_vicunas_marks_unless_told_otherwise(text, marks, expected):
    assert clean_answer(text, *marks) == expected


# Piece by piece


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A dog sleeps.", "A dog sleeps."),
        ("  A dog.\n\n", "A dog."),
        ("A dog.###Human: more", "A dog."),
        ("A #1 dog ## here", "A #1 dog ## here"),
        ("A dog.##", "A dog.##"),
        ("A dog</s> cat", "A dog"),
        ("<s> A <s>dog", "A dog"),
        ("a < b", "a < b"),
        ("   ", ""),
        ("###", ""),
        ("Assistant: A dog.", "A dog."),
        ("Assistants work.", "Assistants work."),
    ],
)
def test_pieces_joined_are_the_answer_however_it_grows(text, said):
    for chars in (1, 2, 3, 7):
        stream = TextStream(["###"], "Assistant:")
        pieces = [stream.feed(text[:end]) for end in range(chars, len(text) + 1, chars)]
        assert "".join([*pieces, stream.finish(text)]) == said


@pytest.mark.parametrize(
    ("grown", "said"),
    [
        (["O", "On", "On ", "On t"], ["O", "n", "", " t"]),
        (["a", "a#", "a##", "a##b"], ["a", "", "", "##b"]),  # may become a stop string
        (["caf\ufffd", "caf\ufffd\ufffd", "café"], ["caf", "", "é"]),  # bytes of a character are missing
        (["a  \n", "a  \nb"], ["a", "  \nb"]),
        (["A dog .", "A dog."], ["A dog .", ""]),  # nothing is taken back
    ],
)
def test_only_what_is_final_is_said(grown, said):
    stream = TextStream(["###"])
    assert [stream.feed(text) for text in grown] == said
    assert stream.finish(f"{grown[-1]}\ufffd") == ("" if grown[-1] == "A dog." else "\ufffd")
    assert stream.said.startswith("".join(said))
