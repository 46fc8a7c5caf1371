"""Rows and batches: ids, targets, masks and image slots, position by position."""

import pytest
import torch
from torch import nn

from minigpt4.models.prompting import (
    IGNORE,
    NO_IMAGE,
    TokenSequence,
    answer_row,
    collate_prompts,
    collate_training,
    conversation_row,
    embed,
    prompt_row,
)

END = [8, 9]
PAD = 7


def condition(*ids):
    return TokenSequence().add_text(list(ids))


def answer(*ids):
    return TokenSequence().add_text(list(ids), train=True)


# Rows


def test_text_and_images_fill_the_four_lists_together():
    row = TokenSequence().add_text([5, 6]).add_image(10, 2).add_text([3], train=True)
    assert row.ids == [5, 6, 0, 0, 3]
    assert row.targets == [IGNORE] * 4 + [3]
    assert row.attend == [1] * 5
    assert row.images == [NO_IMAGE, NO_IMAGE, 10, 11, NO_IMAGE]
    assert (len(row), row.num_targets) == (5, 1)


def test_cut_shortens_all_four_lists():
    row = TokenSequence().add_text([5, 6], train=True).add_image(0, 3).cut(3)
    assert (row.ids, row.targets, row.attend, row.images) == ([5, 6, 0], [5, 6, IGNORE], [1] * 3, [NO_IMAGE] * 2 + [0])


def test_prompt_row_takes_texts_and_images_in_turn():
    row = prompt_row([[4], [], [6]], [(0, 2), (2, 1)], start=[1])
    assert row.ids == [1, 4, 0, 0, 0, 6]
    assert row.images == [NO_IMAGE, NO_IMAGE, 0, 1, 2, NO_IMAGE]
    assert row.num_targets == 0


@pytest.mark.parametrize(("texts", "images"), [([[4]], [(0, 1)]), ([[4], [5], [6]], [(0, 1)])])
def test_prompt_row_with_another_number_of_images_is_refused(texts, images):
    with pytest.raises(ValueError, match=f"the prompt has {len(texts) - 1} <ImageHere>, but 1 images were given"):
        prompt_row(texts, images)


# Answers and their end symbol


@pytest.mark.parametrize("truncate_end", [False, True])
@pytest.mark.parametrize("max_len", [5, 6, 100])
def test_answer_that_fits_is_whole(max_len, truncate_end):
    row = answer_row([1, 2, 3, *END], END, max_len, truncate_end=truncate_end)
    assert row.ids == row.targets == [1, 2, 3, *END]


@pytest.mark.parametrize(("max_len", "kept"), [(4, [1, 2, *END]), (3, [1, *END]), (2, END)])
def test_longer_answer_keeps_its_end_symbol(max_len, kept):
    assert answer_row([1, 2, 3, *END], END, max_len, truncate_end=False).targets == kept


@pytest.mark.parametrize(("max_len", "kept"), [(4, [1, 2, 3, 8]), (3, [1, 2, 3]), (1, [1])])
def test_longer_answer_loses_its_end_symbol_where_asked_for(max_len, kept):
    assert answer_row([1, 2, 3, *END], END, max_len, truncate_end=True).targets == kept


# Conversations: 2 answers of 2 tokens and their end symbol, a question of 3 tokens between

ANSWERS, QUESTION = [[1, 2, *END], [3, 4, *END]], [20, 21, 22]
CHAIN = [*ANSWERS[0], *QUESTION, *ANSWERS[1]]


def chain(max_len, *, truncate_end):
    return conversation_row(ANSWERS, [QUESTION], END, max_len, truncate_end=truncate_end)


@pytest.mark.parametrize("truncate_end", [False, True])
def test_conversation_trains_on_answers_and_not_on_questions(truncate_end):
    row = chain(11, truncate_end=truncate_end)
    assert row.ids == CHAIN
    assert row.targets == [1, 2, *END, IGNORE, IGNORE, IGNORE, 3, 4, *END]


@pytest.mark.parametrize("max_len", range(1, 12))
def test_conversation_is_cut_anywhere_where_asked_for(max_len):
    assert chain(max_len, truncate_end=True).ids == CHAIN[:max_len]


@pytest.mark.parametrize(
    ("max_len", "kept"),
    [
        (2, END),
        (3, [1, *END]),
        (4, ANSWERS[0]),
        (7, ANSWERS[0]),  # the question fits, no answer to it does
        (8, ANSWERS[0]),
        (9, ANSWERS[0]),  # nothing but the end symbol would be left of the answer
        (10, [*ANSWERS[0], *QUESTION, 3, *END]),
        (11, CHAIN),
        (12, CHAIN),
    ],
)
def test_conversation_ends_in_an_answer_with_its_end_symbol(max_len, kept):
    row = chain(max_len, truncate_end=False)
    assert row.ids == kept
    assert row.targets[-len(END) :] == END


# Batches


def test_training_batch_is_start_condition_answer_padding():
    batch = collate_training([condition(3), condition(3, 4, 5)], [answer(6, 8), answer(8)], start=[1], pad_id=PAD)
    assert batch.ids_BT.tolist() == [[1, 3, 6, 8, PAD, PAD], [1, 3, 4, 5, 8, PAD]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch.targets_BT.tolist() == [[IGNORE, IGNORE, 6, 8, IGNORE, IGNORE], [IGNORE] * 4 + [8, IGNORE]]
    assert {tensor.dtype for tensor in (batch.ids_BT, batch.attention_mask_BT, batch.targets_BT)} == {torch.int64}


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([condition(3), condition(3, 4, 5)], pad_id=PAD)
    assert batch.ids_BT.tolist() == [[PAD, PAD, 3], [3, 4, 5]]
    assert batch.attention_mask_BT.tolist() == [[0, 0, 1], [1, 1, 1]]


def image_batch():
    rows = [condition(3).add_image(2, 2), TokenSequence().add_image(0, 2), condition(4)]
    return collate_prompts(rows, pad_id=PAD)


def test_batch_knows_row_and_column_of_every_image_token():
    batch = image_batch()
    places = list(zip(*(index.tolist() for index in batch.image_at), batch.image_source.tolist(), strict=True))
    assert places == [(0, 1, 2), (0, 2, 3), (1, 1, 0), (1, 2, 1)]


def test_embeddings_are_those_of_tokens_and_images_in_their_places():
    table = nn.Embedding(10, 4)
    images = torch.randn(4, 4)
    embeds = embed(image_batch(), table, images)
    expected = torch.stack(
        [
            torch.stack([table.weight[3], images[2], images[3]]),
            torch.stack([table.weight[PAD], images[0], images[1]]),
            torch.stack([table.weight[PAD], table.weight[PAD], table.weight[4]]),
        ]
    )
    assert torch.equal(embeds, expected)


def test_gradient_reaches_the_images_and_not_the_embedding_table():
    table = nn.Embedding(10, 4)
    images = torch.randn(4, 4, requires_grad=True)
    embed(image_batch(), table, images).sum().backward()
    assert torch.equal(images.grad, torch.ones(4, 4))
    assert table.weight.grad is None


def test_image_that_was_cut_away_gets_no_gradient():
    batch = collate_prompts([condition(3).add_image(0, 2).cut(2)], pad_id=PAD)
    images = torch.randn(2, 4, requires_grad=True)
    embed(batch, nn.Embedding(10, 4), images).sum().backward()
    assert images.grad[:, 0].tolist() == [1, 0]
