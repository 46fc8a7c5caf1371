"""The LLM's tokenizer, proved at load: LLaMA's as the reference has it, any other as its tokenizer.json says."""

import json
import logging
from itertools import product
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minigpt4.common.errors import WeightsError, errors_as
from minigpt4.models.llama_tokenizer import PROBES, LlamaPieceTokenizer, read_json, read_llama_tokenizer
from minigpt4.models.llm import read_llm_config

log = logging.getLogger(__name__)

PAD_PIECE = "$$"


def load_tokenizer(directory: str | Path, *, published: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of an LLM directory, padding right, with a pad token that needs no new vocabulary row.

    `published`: a LLaMA's as MiniGPT-4 had it: `$$` is padding, and a text after a special token begins with a blank
    whatever `legacy` in tokenizer_config.json says. No code of the directory runs. Raises WeightsError if it has no
    tokenizer files, or none that can be read exactly.
    """
    directory = Path(directory).expanduser()
    config = read_llm_config(directory)
    with errors_as(WeightsError, f"{directory}: no usable tokenizer"):
        _refuse_code(read_json(directory / "tokenizer_config.json"))
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        tokenizer = read_llama_tokenizer(directory, config.model_type, vocabulary, always_legacy=published)
        tokenizer = tokenizer or _load_other(directory, config)
        tokenizer.padding_side = "right"
        _set_pad_token(tokenizer, PAD_PIECE if published else None)
        start_ids(tokenizer)
    return tokenizer


def _refuse_code(settings: dict[str, Any]) -> None:
    """ValueError where the class of the tokenizer is code in the directory."""
    kind = str(settings.get("tokenizer_class"))
    if "auto_map" in settings and "llama" not in kind.lower() and not hasattr(transformers, kind):
        text = "code of a directory (auto_map) is never run; take an LLM whose tokenizer transformers has"
        raise ValueError(f"tokenizer_config.json: transformers has no tokenizer_class {kind!r}, and {text}")


def _load_other(directory: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """transformers' tokenizer; where its class works otherwise than tokenizer.json says, a plain one of that file."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError("it needs tokenizer.model or tokenizer.json, from where the LLM came, beside config.json")
    options = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(directory, config=config, **options)
    file = directory / "tokenizer.json"
    if not file.is_file():
        return tokenizer
    exact = Tokenizer.from_file(str(file))
    if _steps(getattr(tokenizer, "backend_tokenizer", None)) != _steps(exact):
        log.info("%s: %s would not follow tokenizer.json", directory, type(tokenizer).__name__)
        plain = PreTrainedTokenizerFast.from_pretrained(directory, **options)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            default = getattr(tokenizer, name)
            if getattr(plain, name) is None and default in plain.get_vocab():
                setattr(plain, name, default)
        tokenizer = plain
    exact.no_truncation()
    exact.no_padding()
    adds = tokenizer.init_kwargs.keys() & {"add_bos_token", "add_eos_token"}  # these go over the file
    for probe, special in product(PROBES, (False,) if adds else (False, True)):
        ids = tokenizer(probe, add_special_tokens=special)["input_ids"]
        if ids != exact.encode(probe, add_special_tokens=special).ids:
            raise ValueError(f"tokenizer.json: transformers cuts {probe!r} otherwise than the file says")
    return tokenizer


def _steps(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """What a tokenizer does to text before its vocabulary counts."""
    return tokenizer and {key: json.loads(tokenizer.to_str())[key] for key in ("normalizer", "pre_tokenizer")}


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, piece: str | None) -> None:
    """For LLaMA the `piece`, else the unknown token; for others their own, else the unknown or the end token."""
    vocabulary = tokenizer.get_vocab()
    unknown, own, end = tokenizer.unk_token, tokenizer.pad_token, tokenizer.eos_token
    published = isinstance(tokenizer, LlamaPieceTokenizer)
    candidates = (piece, unknown, own, end) if published else (own, unknown, end)
    token = next((t for t in candidates if t and t in vocabulary), None)
    if token is None:
        raise WeightsError(f"{tokenizer.name_or_path}: its tokenizer has neither unknown, pad nor end token")
    tokenizer.pad_token = token


def hidden_pad_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id that the published code takes for padding even inside a text: LLaMA's `$$`, or its unknown token.

    None for other tokenizers, and where padding shares its id with a token that texts need, such as the end token.
    """
    if isinstance(tokenizer, LlamaPieceTokenizer) and tokenizer.pad_token in (PAD_PIECE, tokenizer.unk_token):
        return tokenizer.pad_token_id
    return None


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: bos for LLaMA, nothing for tokenizers that add none."""
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def end_symbol_ids(tokenizer: PreTrainedTokenizerBase, end_sym: str) -> list[int]:
    """Ids of `end_sym` as they follow a word (LLaMA writes `###` in two ways; a text ends with the second)."""
    if not end_sym:
        return []
    word, ended = tokenizer(["word", "word" + end_sym], add_special_tokens=False)["input_ids"]
    return ended[len(word) :]
