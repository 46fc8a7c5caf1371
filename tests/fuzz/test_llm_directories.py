"""Damaged LLM directories load or are refused by name; nothing else comes out, and memory stays small."""

import json
import random
import resource
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigpt4.common.errors import WeightsError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.llm import read_llm_config
from minigpt4.models.loading import load_language_side
from minigpt4.models.memory import Lengths, MetaModel

CASES = 120
GROWTH = 2 << 20
"""KiB by which the largest memory of this process may grow."""
SOURCES = ("vicuna_tiny", "vicuna_tiny_safetensors", "vicuna_tiny_sharded")
VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 512, 10**4, 10**9, 10**30, 0.5, -0.0, float("inf"), float("nan"), "", "a",
    "</s>", "\ud800", "$$", "é" * 300, "None", "float16", "llama", "gemma2", "gpt2", "LlamaTokenizer", "T5Tokenizer",
    "{{", [], [1], ["a", None], {}, {"a": 1}, {"content": "<s>"}, {"content": 5}, [[1]] * 3,
)  # fmt: skip
KEYS = [
    "model_type", "architectures", "rope_scaling", "rope_parameters", "auto_map", "quantization_config",
    "tokenizer_class", "chat_template", "added_tokens_decoder", "additional_special_tokens", "bos_token", "pad_token",
    "torch_dtype", "dtype", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "vocab_size",
    "eos_token_id", "tie_word_embeddings", "attn_implementation", "_attn_implementation", "sp_model_kwargs",
    "model_max_length", "padding_side", "transformers_weights", "do_sample", "temperature", "normalizer",
    "pre_tokenizer", "post_processor", "decoder", "truncation", "extra_special_tokens",
]  # fmt: skip


def damage(directory: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(directory.iterdir()))
    kind = chance.random()
    if kind < 0.11:
        file.unlink()
        if kind > 0.08:
            file.mkdir()
    elif kind < 0.7 and file.suffix == ".json" and isinstance(tree := parsed(file), dict):
        changed = chance.change(tree, lambda _: chance.choice(VALUES), KEYS)
        file.write_text(json.dumps(changed), encoding="utf-8")
    else:
        file.write_bytes(chance.change_bytes(file.read_bytes()))


def parsed(file: Path):
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


@pytest.fixture
def section(tiny_section) -> MiniGPT4Config:
    known = MiniGPT4Config.__dataclass_fields__
    return MiniGPT4Config(**{key: value for key, value in tiny_section().items() if key in known})


def test_directory_loads_or_is_refused_by_name(random_cases, parity_dir, section, tmp_path, one_thread):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    others, unnamed = {}, []
    for name, chance in random_cases(CASES):
        directory = tmp_path / "llm"
        shutil.copytree(parity_dir / chance.choice(SOURCES), directory)
        if chance.random() < 0.4:
            (directory / "tokenizer.model").unlink()
            converted = parity_dir.parent / "llama_tokenizers" / "tokenizer_v4.json"
            shutil.copy(converted, directory / "tokenizer.json")
        with suppress(IsADirectoryError, PermissionError):  # of a file that was turned into a folder
            for _ in range(chance.choice((1, 1, 1, 2, 4))):
                damage(directory, chance)
        try:
            if chance.random() < 0.2:
                sized = replace(section, llama_model=str(directory))
                MetaModel(sized, read_llm_config(directory)).estimate(1, Lengths(4, 4))
            load_language_side(section, directory, torch.device("cpu"))
        except WeightsError as error:
            if str(directory) not in str(error):
                unnamed.append((name, str(error)))
        except Exception as error:
            others[name] = repr(error)
        shutil.rmtree(directory)
    assert not others
    assert not unnamed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
