"""Ids and strings are those of the slow SentencePiece tokenizer that MiniGPT-4 was trained with."""

import logging

import pytest

from minigpt4.common.errors import WeightsError
from minigpt4.models.tokenizer import LlamaPieceTokenizer, end_symbol_ids, hidden_pad_id, load_tokenizer

DIRECTORIES = ("vicuna_tiny", "vicuna_tiny_safetensors", "vicuna_tiny_sharded")


@pytest.fixture(scope="module", params=DIRECTORIES)
def tokenizer(request, parity_dir):
    return load_tokenizer(parity_dir / request.param)


@pytest.fixture(scope="module")
def expected(golden):
    return golden["tokenizer"]


def test_ids_without_special_tokens_meet_the_reference(tokenizer, expected):
    cases = expected["cases"]
    ids = [tokenizer(case["text"], add_special_tokens=False)["input_ids"] for case in cases]
    assert ids == [case["ids"] for case in cases]


def test_ids_with_bos_meet_the_reference(tokenizer, expected):
    cases = expected["cases"]
    ids = [tokenizer(case["text"])["input_ids"] for case in cases]
    assert ids == [case["ids_special"] for case in cases]


def test_pieces_meet_the_reference(tokenizer, expected):
    cases = expected["cases"]
    pieces = [tokenizer.convert_ids_to_tokens(case["ids"]) for case in cases]
    assert pieces == [case["pieces"] for case in cases]


def test_tokenize_gives_the_pieces_of_the_reference(tokenizer, expected):
    cases = expected["cases"]
    assert [tokenizer.tokenize(case["text"]) for case in cases] == [case["pieces"] for case in cases]


@pytest.mark.parametrize("index", range(3))
def test_padded_and_cut_batches_meet_the_reference(tokenizer, expected, index):
    case = expected["batched"][index]
    batch = tokenizer(case["texts"], **case["kwargs"])
    assert batch["input_ids"] == case["input_ids"]
    assert batch["attention_mask"] == case["attention_mask"]


@pytest.mark.parametrize(("skip", "field"), [(True, "skip_special"), (False, "keep_special")])
def test_decoded_text_meets_the_reference(tokenizer, expected, skip, field):
    cases = expected["decode"]
    texts = [tokenizer.decode(case["ids"], skip_special_tokens=skip) for case in cases]
    assert texts == [case[field] for case in cases]


def test_batch_decode_gives_the_text_of_every_row(tokenizer, expected):
    cases = expected["decode"]
    texts = tokenizer.batch_decode([case["ids"] for case in cases], skip_special_tokens=True)
    assert texts == [case["skip_special"] for case in cases]


def test_special_ids_come_from_the_tokenizer_and_not_from_config_json(tokenizer, expected):
    names = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    assert {name: getattr(tokenizer, name) for name in names} == {name: expected[name] for name in names}
    assert set(tokenizer.all_special_ids) == set(expected["all_special_ids"])


def test_pad_token_is_the_double_dollar_piece_and_pads_right(tokenizer, expected):
    assert (tokenizer.pad_token, tokenizer.padding_side) == (expected["pad_token"], expected["padding_side_default"])
    assert hidden_pad_id(tokenizer) == expected["pad_token_id"]


def test_double_dollar_is_padding_inside_a_word_and_text_at_a_word_start(tokenizer):
    inside = tokenizer("a$$b", add_special_tokens=False)["input_ids"]
    at_start = tokenizer("price: $$ 5", add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id in inside
    assert tokenizer.pad_token_id not in at_start


@pytest.mark.parametrize("end_sym", ["###", "\n", "</s>", ""])
def test_end_symbol_ids_end_every_answer_that_ends_with_it(tokenizer, end_sym):
    answer = tokenizer("A dog sleeps." + end_sym, add_special_tokens=False)["input_ids"]
    plain = tokenizer("A dog sleeps.", add_special_tokens=False)["input_ids"]
    assert plain + end_symbol_ids(tokenizer, end_sym) == answer


def test_ids_outside_of_sentencepiece_are_left_out_of_the_text(tokenizer):
    assert tokenizer.decode([1, 443, 443, 512]) == "<s> "


def test_decode_takes_tensors_single_ids_and_nested_lists(tokenizer, expected):
    import torch

    case = next(case for case in expected["decode"] if len(case["ids"]) > 3)
    text = case["keep_special"]
    assert tokenizer.decode(torch.tensor(case["ids"])) == text
    assert tokenizer.decode([case["ids"], case["ids"]]) == [text, text]
    assert tokenizer.decode(1) == "<s>"


def test_directory_without_tokenizer_is_refused_by_name(llm_copy):
    directory = llm_copy()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink()
    with pytest.raises(WeightsError) as error:
        load_tokenizer(directory)
    assert f"{directory}: no usable tokenizer" in str(error.value)
    assert "tokenizer.model or tokenizer.json beside config.json" in str(error.value)


def test_damaged_tokenizer_model_is_refused_by_name(llm_copy):
    directory = llm_copy()
    (directory / "tokenizer.model").write_bytes(b"not a SentencePiece model")
    with pytest.raises(WeightsError, match="no usable tokenizer"):
        load_tokenizer(directory)


def test_sentencepiece_of_other_options_is_read_as_transformers_reads_it(llm_copy, caplog):
    import sentencepiece

    directory = llm_copy()
    corpus = directory / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        add_dummy_prefix=False,
        minloglevel=2,
    )
    with caplog.at_level(logging.WARNING, logger="minigpt4.models.tokenizer"):
        tokenizer = load_tokenizer(directory)
    assert not isinstance(tokenizer, LlamaPieceTokenizer)
    assert "its SentencePiece options are not LLaMA's" in caplog.text
    assert tokenizer.pad_token == tokenizer.unk_token
