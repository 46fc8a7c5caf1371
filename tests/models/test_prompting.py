"""Samples become token sequences: ids, targets, masks and images position by position; faults name field and sample."""

import logging
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from minigpt4.common.errors import MiniGPT4Error, SampleError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.prompting import (
    IGNORE,
    NO_IMAGE,
    PromptBuilder,
    TokenSequence,
    answer_row,
    apply_template,
    collate_prompts,
    collate_training,
    embed,
    read_prompts,
    read_samples,
)

CASES = Path(__file__).parents[1] / "data/cases"
TEMPLATE = "###Human: {} ###Assistant: "
IMAGE = "<Img><ImageHere></Img>"
END = [8, 9]
PAD = 7


def condition(*ids):
    return TokenSequence().add_text(list(ids))


def answer(*ids):
    return TokenSequence().add_text(list(ids), train=True)


def test_the_four_lists_grow_and_are_cut_together():
    row = TokenSequence().add_text([5, 6]).add_image(10, 2).add_text([3], train=True)
    assert row.ids == [5, 6, 0, 0, 3]
    assert row.targets == [IGNORE] * 4 + [3]
    assert row.attend == [1] * 5
    assert row.images == [NO_IMAGE, NO_IMAGE, 10, 11, NO_IMAGE]
    assert (len(row), row.num_targets) == (5, 1)
    row.cut(3)
    assert (row.ids, row.targets, row.attend) == ([5, 6, 0], [IGNORE] * 3, [1] * 3)
    assert row.images == [NO_IMAGE, NO_IMAGE, 10]


# Answers of a conversation, 2 tokens and their end symbol each, and a question of 3 tokens between

ANSWERS, QUESTION = [[1, 2, *END], [3, 4, *END]], [20, 21, 22]
CHAIN = [*ANSWERS[0], *QUESTION, *ANSWERS[1]]


def test_answers_are_trained_on_and_questions_are_not():
    row = answer_row(ANSWERS, [QUESTION], END, 11, truncate_end=False)
    assert row.ids == CHAIN
    assert row.targets == [1, 2, *END, IGNORE, IGNORE, IGNORE, 3, 4, *END]


@pytest.mark.parametrize("max_len", range(1, 12))
def test_an_answer_is_cut_anywhere_where_asked_for(max_len):
    assert answer_row(ANSWERS, [QUESTION], END, max_len, truncate_end=True).ids == CHAIN[:max_len]
    assert answer_row(ANSWERS[:1], [], END, max_len, truncate_end=True).ids == ANSWERS[0][:max_len]


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


# Batches


def test_training_batch_is_start_condition_answer_padding():
    batch = collate_training([condition(3), condition(3, 4, 5)], [answer(6, 8), answer(8)], start=[1], pad_id=PAD)
    assert batch.ids_BT.tolist() == [[1, 3, 6, 8, PAD, PAD], [1, 3, 4, 5, 8, PAD]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch.targets_BT.tolist() == [[IGNORE, IGNORE, 6, 8, IGNORE, IGNORE], [IGNORE] * 4 + [8, IGNORE]]
    assert {tensor.dtype for tensor in (batch.ids_BT, batch.attention_mask_BT, batch.targets_BT)} == {torch.int64}


def test_prompts_are_padded_on_the_left_and_images_stand_in_their_places():
    rows = [condition(3).add_image(2, 2), TokenSequence().add_image(0, 2), condition(4).add_image(4, 2).cut(2)]
    batch = collate_prompts(rows, pad_id=PAD)
    assert batch.ids_BT.tolist() == [[3, 0, 0], [PAD, 0, 0], [PAD, 4, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    places = list(zip(*(index.tolist() for index in batch.image_at), batch.image_source.tolist(), strict=True))
    assert places == [(0, 1, 2), (0, 2, 3), (1, 1, 0), (1, 2, 1), (2, 2, 4)]
    table, images = nn.Embedding(10, 4).requires_grad_(False), torch.randn(6, 4, requires_grad=True)
    embeds = embed(batch, table, images)
    parts = [table.weight[3], images[2], images[3], table.weight[PAD], images[0], images[1]]
    assert torch.equal(embeds.flatten(0, 1), torch.stack([*parts, table.weight[PAD], table.weight[4], images[4]]))
    embeds.sum().backward()
    assert images.grad[:, 0].tolist() == [1, 1, 1, 1, 1, 0], "one was cut away"
    assert table.weight.grad is None
    embed(batch, table.requires_grad_(), images).sum().backward()
    assert table.weight.grad[:, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 2, 0, 0], "of a trained LLM, padding included"


# Texts


@pytest.fixture(scope="module")
def ids(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def rules(tokenizer):
    return lambda **changes: PromptBuilder(tokenizer, MiniGPT4Config(max_txt_len=160, end_sym="###", **changes))


def conversation(*answers):
    return read_samples({"conv_q": [f"{IMAGE} What? !@#And? "], "conv_a": ["!@#".join(answers)], "connect_sym": "!@#"})


def test_condition_without_any_prompt_is_the_image_alone(rules):
    (row,) = rules().condition_rows(read_samples({"answer": ["a"]}), [[(0, 8)]])
    assert row.images == list(range(8))


@pytest.mark.parametrize(("chat_template", "before"), [(False, "Look: "), (True, "###Human: Look: ")])
def test_instructions_go_into_the_template_only_where_asked_for_and_before_the_prompts(
    rules, ids, chat_template, before
):
    samples = read_samples({"answer": ["a"], "instruction_input": "Look: <ImageHere>"})
    build = rules(prompt_template=TEMPLATE, chat_template=chat_template)
    build.prompt_list = ["never"]
    (row,) = build.condition_rows(samples, [[(0, 2)]])
    assert row.ids == [*ids(before), 0, 0, *ids(" ###Assistant: " if chat_template else "")]


def test_first_question_of_a_conversation_is_in_the_template(rules, ids):
    (row,) = rules(prompt_template=TEMPLATE).condition_rows(conversation("a", "b"), [[(0, 2)]])
    assert row.ids == [*ids("###Human: <Img>"), 0, 0, *ids("</Img> What?  ###Assistant: ")]


def test_padding_piece_is_no_target_in_an_answer_and_not_attended_to_in_a_conversation(rules, tokenizer):
    pad = tokenizer.pad_token_id
    (alone,) = rules().answer_rows(read_samples({"answer": ["a$$b"]}))
    assert pad in alone.ids
    assert pad not in alone.targets
    assert alone.attend == [1] * len(alone)
    (talk,) = rules().answer_rows(conversation("a$$b", "c"))
    where = talk.ids.index(pad)
    assert (talk.targets[where], talk.attend[where]) == (pad, 0)


# Prompts and templates


def test_prompts_are_the_lines_with_a_placeholder_without_line_ends(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"{IMAGE} one \r\n\r\nnothing\n{IMAGE} dos ñ".encode())
    with caplog.at_level(logging.INFO, logger="minigpt4.models.prompting"):
        prompts = read_prompts(str(path), "[INST] {} [/INST] ")
    assert prompts == [f"[INST] {IMAGE} one  [/INST] ", f"[INST] {IMAGE} dos ñ [/INST] "]
    assert "2 training prompts, for example: [INST]" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_mark_of_a_prompt_file_is_no_part_of_a_prompt(tmp_path, encoding):
    text = (CASES / "prompts_bom.txt").read_bytes().decode("utf-8-sig")
    (tmp_path / "prompts.txt").write_bytes(text.encode(encoding))
    assert read_prompts(str(tmp_path / "prompts.txt"), TEMPLATE) == [
        f"###Human: {IMAGE} Describe this image. ###Assistant: ",
        f"###Human: {IMAGE} What is 100% of {{this}}? ###Assistant: ",
    ]


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


def test_no_prompt_file_means_no_prompts_and_draws_nothing():
    random.seed(0)
    state = random.getstate()
    assert read_prompts(None, TEMPLATE) == read_prompts("", TEMPLATE) == []
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [("", "a {} b", "a {} b"), ("<{}>", "a", "<a>"), ("<{}>", "{x}", "<{x}>"), ("{{}}{}", "a", "{}a")],
)
def test_template_takes_the_text_as_it_is(template, text, expected):
    assert apply_template(template, text) == expected


# LAVIS's samples


@pytest.mark.parametrize("mark", ["!@#", ["!@#", "ignored"]])
def test_conversations_are_split_at_the_connecting_symbol_of_the_first_sample(mark):
    samples = read_samples({"conv_q": ["q1!@#q2", "q"], "conv_a": ["a1!@#a2", "a"], "connect_sym": mark})
    assert samples.conversations == [(["q1", "q2"], ["a1", "a2"]), (["q"], ["a"])]
    assert len(samples) == 2


def test_one_string_serves_all_samples_and_lengths_become_a_list():
    samples = read_samples({"answer": ["a", "b"], "instruction_input": "look", "image": IMAGES, "length": [1, 2]})
    assert (samples.instructions, samples.lengths) == (["look", "look"], [1, 2])
    assert read_samples({"answer": ["a", "b"], "image": IMAGES, "length": torch.tensor([1, 2])}).lengths == [1, 2]
    assert read_samples({"answer": "a dog"}).answers == ["a dog"]


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
