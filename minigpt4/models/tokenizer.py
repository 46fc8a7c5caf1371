"""The LLM's tokenizer, exact where LLaMA's SentencePiece model is concerned.

transformers 5 turns `tokenizer.model` into a fast tokenizer that puts no blank before text after a special
token and none before text that begins with a blank. MiniGPT-4 was trained with the slow tokenizer, which does
both, so prompts would get other ids. `LlamaPieceTokenizer` encodes by the same fast code under SentencePiece's
own rules and decodes by SentencePiece itself.
"""

import logging
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from minigpt4.common.errors import WeightsError
from minigpt4.models.llm import read_llm_config

log = logging.getLogger(__name__)

PAD_PIECE = "$$"
_BLANK = "▁"
_PROBES = (
    " leading",
    "two  blanks",
    "trailing ",
    "###Human: <Img>",
    "line\nline",
    "café 日本 😀",
    "10:30",
    "\t",
)


class LlamaPieceTokenizer(LlamaTokenizer):
    """LLaMA tokenizer with the ids and strings of the slow SentencePiece one (transformers 4.30)."""

    pieces: sentencepiece.SentencePieceProcessor

    @classmethod
    def from_directory(cls, directory: Path) -> "LlamaPieceTokenizer":
        tokenizer = cls.from_pretrained(directory)
        tokenizer.pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        backend = tokenizer.backend_tokenizer
        # Before the normalizer is set: tokens that it has touched once keep its blank in their names.
        specials = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token)
        backend.add_special_tokens([AddedToken(str(t), normalized=False, special=True) for t in specials])
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
        backend.pre_tokenizer = None
        return tokenizer

    def agrees_with_pieces(self) -> bool:
        """Whether ids equal SentencePiece's on strings that LLaMA tokenizers treat alike and others do not."""
        encoded = self(list(_PROBES), add_special_tokens=False)["input_ids"]
        return encoded == [self.pieces.encode(probe) for probe in _PROBES]

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """Text of one list of ids (or of each list in a list of lists)."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], (list, tuple)):
            return [self._decode_row(row, skip_special_tokens) for row in ids]
        return self._decode_row(list(ids), skip_special_tokens)

    def batch_decode(self, sequences, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """Text of each list of ids."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def _decode_row(self, ids: list[int], skip_special_tokens: bool) -> str:
        """SentencePiece text between special tokens; a run that a special token ends keeps its first blank, as
        in the slow tokenizer. Ids that SentencePiece does not know (Vicuna v0's 32000) are left out."""
        specials = set(self.all_special_ids)
        known = [i for i in ids if i < self.pieces.get_piece_size()]
        if skip_special_tokens:
            return self.pieces.decode([i for i in known if i not in specials])
        text, run = "", []
        for i in known:
            if i not in specials:
                run.append(i)
                continue
            text += (f" {self.pieces.decode(run)}" if run else "") + self.pieces.id_to_piece(i)
            run = []
        return text + self.pieces.decode(run)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an LLM directory, padding right, with a pad token that needs no new vocabulary row.

    Raises WeightsError if the directory has no tokenizer files.
    """
    directory = Path(directory).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, config=read_llm_config(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{directory}: no usable tokenizer ({first_line}). The directory needs tokenizer.model or "
            "tokenizer.json beside config.json; copy them from where the LLM came from."
        ) from error
    if (directory / "tokenizer.model").is_file() and isinstance(tokenizer, LlamaTokenizer):
        exact = LlamaPieceTokenizer.from_directory(directory)
        if exact.agrees_with_pieces():
            tokenizer = exact
        else:
            log.warning("%s: its SentencePiece options are not LLaMA's; using transformers' reading", directory)
    tokenizer.padding_side = "right"
    _set_pad_token(tokenizer)
    return tokenizer


def _set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """`$$` as published, else the unknown token, else what the tokenizer has, else the end token."""
    vocabulary = tokenizer.get_vocab()
    candidates = (PAD_PIECE, tokenizer.unk_token, tokenizer.pad_token, tokenizer.eos_token)
    token = next((t for t in candidates if t is not None and t in vocabulary), None)
    if token is None:
        raise WeightsError(f"{tokenizer.name_or_path}: its tokenizer has neither unknown, pad nor end token")
    tokenizer.pad_token = token


def hidden_pad_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id that the published code takes for padding even inside a text (`$$`, or the unknown token).

    None where padding shares its id with a token that texts need, such as the end token.
    """
    if tokenizer.pad_token in (PAD_PIECE, tokenizer.unk_token):
        return tokenizer.pad_token_id
    return None


def end_symbol_ids(tokenizer: PreTrainedTokenizerBase, end_sym: str) -> list[int]:
    """Ids of `end_sym` as they follow a word (LLaMA writes `###` in two ways; a text ends with the second)."""
    if not end_sym:
        return []
    word, ended = tokenizer(["word", "word" + end_sym], add_special_tokens=False)["input_ids"]
    return ended[len(word) :]
