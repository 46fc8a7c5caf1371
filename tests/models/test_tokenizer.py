"""Ids and strings are those of the slow SentencePiece tokenizer that MiniGPT-4 was trained with."""

import json

import pytest
import torch
from tokenizers import Tokenizer, processors

from minigpt4.common.errors import WeightsError
from minigpt4.models.tokenizer import end_symbol_ids, hidden_pad_id, load_tokenizer, start_ids


@pytest.fixture(scope="module")
def expected(golden):
    return golden["tokenizer"]


def test_ids_and_pieces_meet_the_reference(tokenizer, expected):
    for case in expected["cases"]:
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"]
        assert tokenizer(case["text"])["input_ids"] == case["ids_special"]
        assert tokenizer.convert_ids_to_tokens(case["ids"]) == tokenizer.tokenize(case["text"]) == case["pieces"]


def test_decoded_text_meets_the_reference(tokenizer, expected):
    rows = [case["ids"] for case in expected["decode"]]
    for skip, field in ((True, "skip_special"), (False, "keep_special")):
        texts = [case[field] for case in expected["decode"]]
        assert [tokenizer.decode(torch.tensor(ids), skip_special_tokens=skip) for ids in rows] == texts
        assert tokenizer.batch_decode(rows, skip_special_tokens=skip) == texts
    assert tokenizer.decode([1, 443, 443, 512]) == "<s> ", "ids outside of SentencePiece are left out"


def test_padded_and_cut_batches_meet_the_reference(tokenizer, expected):
    for case in expected["batched"]:
        batch = tokenizer(case["texts"], **case["kwargs"])
        assert batch["input_ids"] == case["input_ids"]
        assert batch["attention_mask"] == case["attention_mask"]


def test_special_ids_come_from_the_tokenizer_and_padding_is_the_double_dollar_piece(tokenizer, expected):
    names = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    assert {name: getattr(tokenizer, name) for name in names} == {name: expected[name] for name in names}
    assert set(tokenizer.all_special_ids) == set(expected["all_special_ids"])
    assert (tokenizer.pad_token, tokenizer.padding_side) == (expected["pad_token"], expected["padding_side_default"])
    assert hidden_pad_id(tokenizer) == expected["pad_token_id"]
    # Padding inside a word, text at its start
    assert tokenizer.pad_token_id in tokenizer("a$$b", add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id not in tokenizer("price: $$ 5", add_special_tokens=False)["input_ids"]


def test_end_symbol_ids_end_every_answer_that_ends_with_it(tokenizer):
    for end_sym in ("###", "\n", "</s>", ""):
        answer, plain = tokenizer([f"A dog sleeps.{end_sym}", "A dog sleeps."], add_special_tokens=False)["input_ids"]
        assert plain + end_symbol_ids(tokenizer, end_sym) == answer


def test_directory_without_a_whole_tokenizer_is_refused_by_name(llm_copy):
    directory = llm_copy()
    (directory / "tokenizer.model").write_bytes(b"not a SentencePiece model")
    with pytest.raises(WeightsError, match=f"{directory}: no usable tokenizer"):
        load_tokenizer(directory)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink()
    with pytest.raises(WeightsError, match=f"{directory}: no usable tokenizer.*tokenizer.model or tokenizer.json"):
        load_tokenizer(directory)


@pytest.fixture
def byte_level(tmp_path, byte_level_bpe):
    """`byte_level(tokenizer_config, model_type)`: an LLM directory with such a tokenizer.json, which puts bos first."""
    tokenizer = byte_level_bpe("<|begin|>", "<|end|>", "<|pad|>")
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])

    def make(config: dict | None, model_type: str = "llama"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 303}))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", None])
def test_byte_level_tokenizer_gives_the_ids_of_its_file(byte_level, kind, model_type):
    directory = byte_level(TOKENS | ({"tokenizer_class": kind} if kind else {}), model_type)
    tokenizer, exact = load_tokenizer(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in (" leading", "isn't 123", "a$$b $$", "x<|end|> y", "é日"):
        assert tokenizer(text)["input_ids"] == exact.encode(text).ids
    assert start_ids(tokenizer) == [exact.token_to_id("<|begin|>")]


@pytest.mark.parametrize(("own", "pad"), [({"pad_token": "<|pad|>"}, "<|pad|>"), ({}, "<|end|>")])
def test_pad_of_a_byte_level_tokenizer_is_its_own_or_its_end_token_and_hides_nothing(byte_level, own, pad):
    tokenizer = load_tokenizer(byte_level({"eos_token": "<|end|>"} | own))
    assert "$$" in tokenizer.get_vocab()
    assert tokenizer.pad_token == pad
    assert hidden_pad_id(tokenizer) is None
    assert start_ids(tokenizer) == tokenizer("")["input_ids"] != [], "though nothing names bos"
