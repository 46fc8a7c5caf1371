"""Samples become token sequences: ids, targets, masks and images position by position; faults name field and sample."""

import logging
from pathlib import Path

import pytest
import torch

from minigpt4.common.errors import MiniGPT4Error, SampleError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.prompting import (
    PromptBuilder,
    answer_row,
    read_prompts,
    read_samples,
)

CASES = Path(__file__).parents[1] / "data/cases"
TEMPLATE = "###Human: {} ###Assistant: "
IMAGE = "<Img><ImageHere></Img>"
END = [8, 9]
PAD = 7


# Answers of a conversation, 2 tokens and their end symbol each, and a question of 3 tokens between

ANSWERS, QUESTION = [[1, 2, *END], [3, 4, *END]], [20, 21, 22]
CHAIN = [*ANSWERS[0], *QUESTION, *ANSWERS[1]]


@pytest.mark.parametrize(
    ("max_len", "kept"),
    [
        (2, END),
        (3, [1, *END]),
        (4, ANSWERS[0]),
        (7, ANSWERS[0]),  # the question fits, no answer to it does
        (9, ANSWERS[0]),  # nothing but the end symbol would be left of the answer
        (10, [*ANSWERS[0], *QUESTION, 3, *END]),
        (11, CHAIN),
        (12, CHAIN),
    ],
)
def test_an_answer_that_is_cut_keeps_its_end_symbol(max_len, kept):
    row = answer_row(ANSWERS, [QUESTION], END, max_len, truncate_end=False)
    assert row.ids == kept
    assert row.targets[-len(END) :] == END


# Texts


@pytest.fixture(scope="module")
def ids(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def rules(tokenizer):
    return lambda **changes: PromptBuilder(tokenizer, MiniGPT4Config(max_txt_len=160, end_sym="###", **changes))


@pytest.mark.parametrize(("chat_template", "before"), [(False, "Look: "), (True, "###Human: Look: ")])
def test_instructions_go_into_the_template_only_where_asked_for_and_before_the_prompts(
    rules, ids, chat_template, before
):
    samples = read_samples({"answer": ["a"], "instruction_input": "Look: <ImageHere>"})
    build = rules(prompt_template=TEMPLATE, chat_template=chat_template)
    build.prompt_list = ["never"]
    (row,) = build.condition_rows(samples, [[(0, 2)]])
    assert row.ids == [*ids(before), 0, 0, *ids(" ###Assistant: " if chat_template else "")]


# Prompts and templates


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_the_lines_with_a_placeholder_without_line_ends_and_byte_order_mark(tmp_path, caplog, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"{IMAGE} one \r\n\r\nnothing\n{IMAGE} 100% dos {{ñ}}".encode(encoding))
    with caplog.at_level(logging.INFO, logger="minigpt4.models.prompting"):
        prompts = read_prompts(str(path), "[INST] {} [/INST] ")
    assert prompts == [f"[INST] {IMAGE} one  [/INST] ", f"[INST] {IMAGE} 100% dos {{ñ}} [/INST] "]
    assert "2 training prompts, for example: [INST]" in caplog.text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (f"{IMAGE} café".encode("cp1252"), "UTF-8 text .byte 0xe9 in line 1"),
        (f"a\n{IMAGE} caf\ufffd".encode(), "line 2 cannot be read: character"),
        (f"{IMAGE} a".encode("utf-16-le"), "line 1 cannot be read: .*UTF-16"),
        (b"Describe it.\n<Img></Img>\n", "contains <ImageHere>"),
        (None, "cannot be read: "),
    ],
)
def test_unreadable_prompts_are_refused(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(MiniGPT4Error, match=rf"model.prompt_path: .*prompts\.txt.*{complaint}"):
        read_prompts(str(tmp_path / "prompts.txt"), "")


# LAVIS's samples


def test_one_string_serves_all_samples():
    samples = read_samples({"answer": ["a", "b"], "instruction_input": "look", "image": IMAGES, "length": [1, 2]})
    assert (samples.instructions, samples.lengths) == (["look", "look"], [1, 2])
    assert read_samples({"answer": "a dog"}).answers == ["a dog"]
    talk = read_samples({"conv_q": ["q1!@#q2", "q"], "conv_a": ["a1!@#a2", "a"], "connect_sym": "!@#"})
    assert talk.conversations == [(["q1", "q2"], ["a1", "a2"]), (["q"], ["a"])]


@pytest.mark.parametrize(
    ("ids", "name"),
    [(["x7", "x8"], " (image_id x8)"), (torch.tensor([7, 8]), " (image_id 8)"), (["one"], ""), (None, "")],
)
def test_samples_are_named_by_their_image_or_else_by_their_index(ids, name):
    assert read_samples({"answer": ["a", "b"], "image_id": ids}).name(1) == f"sample 1 of the batch{name}"


TALK = {"conv_q": ["q", "q!q"], "conv_a": ["a", "a!a"], "connect_sym": ["!"]}
IMAGES = torch.zeros(2, 2, 3, 4, 4)
PAIR = {"answer": ["a", "b"]}


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ({"text_input": ["a"], "image_id": [1]}, "'conv_q' and 'conv_a', or 'conversations'; they have image_id,"),
        (PAIR | TALK, "need either 'answer', or"),
        ({"conv_q": ["q"], "connect_sym": ["!"]}, "a batch with 'conv_q' also needs 'conv_a'"),
        ({"conv_q": ["q"], "conv_a": ["a"]}, "a batch with 'conv_q' also needs 'connect_sym'"),
        (TALK | {"conv_a": ["a"]}, "conv_a: not as many entries as conv_q"),
        (TALK | {"conv_a": ["a", "a"]}, "sample 1 of the batch: 2 questions in conv_q, 1 answers in conv_a"),
        (PAIR | {"image": torch.zeros(3, 3, 4, 4)}, "image: 3 entries for 2 samples"),
        (PAIR | {"instruction_input": ["look"]}, "instruction_input: 1 entries for 2 samples"),
        (PAIR | {"image": IMAGES, "length": [1, 1, 1]}, "length: 3 entries for 2 samples"),
        (PAIR | {"length": [1, 1]}, "length: needs image of shape"),
        (PAIR | {"image": IMAGES[0], "length": [1, 1]}, "length: needs image of shape"),
        (PAIR | {"image": IMAGES, "length": [2, -1]}, "length: -1 images in sample 1 of the batch"),
        (PAIR | {"image": IMAGES, "length": [2, 3]}, "length: 3 images in sample 1 of the batch"),
    ],
)
def test_batches_that_are_not_read_name_field_and_sample(samples, text):
    with pytest.raises(SampleError) as error:
        read_samples(samples)
    assert text in str(error.value)
