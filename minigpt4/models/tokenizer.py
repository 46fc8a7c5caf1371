"""The LLM's tokenizer, proved at load: LLaMA's as the reference has it, any other as its tokenizer.json says."""

import logging
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minigpt4.common.errors import WeightsError, errors_as
from minigpt4.models.llama_tokenizer import PROBES, LlamaPieceTokenizer, read_llama_tokenizer
from minigpt4.models.llm import read_llm_config

log = logging.getLogger(__name__)

PAD_PIECE = "$$"


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an LLM directory, padding right, with a pad token that needs no new vocabulary row.

    No code of the directory runs. Raises WeightsError if it has no tokenizer files, or none that can be read exactly.
    """
    directory = Path(directory).expanduser()
    config = read_llm_config(directory)
    with errors_as(WeightsError, f"{directory}: no usable tokenizer"):
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        tokenizer = read_llama_tokenizer(directory, config.model_type, vocabulary) or _load_other(directory, config)
        tokenizer.padding_side = "right"
        _set_pad_token(tokenizer)
        start_ids(tokenizer)
    return tokenizer


def _load_other(directory: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """transformers' tokenizer; the one of tokenizer.json where its class would give other ids than that file."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise WeightsError(
            f"{directory}: no usable tokenizer: it needs tokenizer.model or tokenizer.json beside config.json; copy "
            "them from where the LLM came from."
        )
    options = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(directory, config=config, **options)
    file = directory / "tokenizer.json"
    if not file.is_file():
        return tokenizer
    exact = Tokenizer.from_file(str(file))
    exact.no_truncation()
    exact.no_padding()
    for kind in (lambda: tokenizer, lambda: PreTrainedTokenizerFast.from_pretrained(directory, **options)):
        candidate = kind()
        if all(
            candidate(probe, add_special_tokens=special)["input_ids"]
            == exact.encode(probe, add_special_tokens=special).ids
            for probe in PROBES
            for special in (True, False)
        ):
            return candidate
        log.warning("%s: transformers' %s gives other ids than tokenizer.json", directory, type(candidate).__name__)
    raise WeightsError(f"{directory}: no usable tokenizer: transformers reads tokenizer.json otherwise than it says")


def _set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """For LLaMA `$$` as published, else the unknown token; for others their own, else the unknown or the end token."""
    vocabulary = tokenizer.get_vocab()
    unknown, own, end = tokenizer.unk_token, tokenizer.pad_token, tokenizer.eos_token
    published = isinstance(tokenizer, LlamaPieceTokenizer)
    candidates = (PAD_PIECE, unknown, own, end) if published else (own, unknown, end)
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
