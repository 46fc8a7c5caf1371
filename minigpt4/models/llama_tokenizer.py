"""LLaMA's tokenizer with the ids and strings of the slow one of transformers 4.30, which MiniGPT-4 was trained with.

Each stretch of text between special and added tokens is encoded by SentencePiece on its own and so begins with a blank.
Special tokens are read as 4.30 reads them: text beside a token that `special_tokens_map.json` or `added_tokens.json`
names without further word loses its blanks, and an empty name means the id that SentencePiece gives it, 0.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizer

log = logging.getLogger(__name__)

BLANK = "▁"
PROBES = (
    "The quick brown fox, isn't it?",
    " leading and trailing ",
    "two  blanks\n\nand lines\t.",
    "###Human: <Img></Img> Describe 10:30, $x^2$ and `code()`.",
    "café 日本 😀 \x00",
)
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_NAMES = (*_DEFAULTS, "sep_token", "pad_token", "cls_token", "mask_token")


class LlamaPieceTokenizer(PreTrainedTokenizer):
    """SentencePiece between special tokens.

    `added`: tokens that texts are cut at, by id; those past the pieces are surrounded by blanks in decoded text.
    `legacy`: a stretch after a special token begins with a blank, too; False, as later transformers have it: the first
    of a text alone.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        pieces: SentencePieceProcessor,
        added: Mapping[int, AddedToken],
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool = True,
        **kwargs,
    ) -> None:
        self._inner_pieces = pieces if legacy else _without_prefix(pieces)
        self.pieces, self.legacy = pieces, legacy
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self._piece_ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
        self._added_tokens_decoder = dict(added)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._piece_ids)

    def get_vocab(self) -> dict[str, int]:
        return self._piece_ids | self._added_tokens_encoder

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        before = [self.bos_token_id] if self.add_bos_token else []
        behind = [self.eos_token_id] if self.add_eos_token else []
        ids = [*before, *token_ids_0, *behind]
        return ids if token_ids_1 is None else [*ids, *before, *token_ids_1, *behind]

    def tokenize(self, text: str, **kwargs) -> list[str]:
        """Pieces and added tokens of a text. `$$`, the pad token, is a piece like others."""
        parts, added = self.tokens_trie.split(text), self._added_tokens_encoder
        for place, part in enumerate(parts):
            if part in added:
                token = self._added_tokens_decoder[added[part]]
                if token.lstrip and place > 0:
                    parts[place - 1] = parts[place - 1].rstrip()
                if token.rstrip and place + 1 < len(parts):
                    parts[place + 1] = parts[place + 1].lstrip()
        tokens: list[str] = []
        for part in filter(None, parts):
            pieces = self._inner_pieces if tokens else self.pieces
            tokens += [part] if part in added else pieces.encode(part, out_type=str)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._piece_ids.get(token, self.pieces.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs) -> str:
        """Text of the ids. Those that are neither piece nor added token (Vicuna v0's 32000) are left out."""
        specials, size = set(self.all_special_ids) if skip_special_tokens else (), self.vocab_size
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        ids = [i for i in ids if i not in specials and (i < size or i in self._added_tokens_decoder)]
        parts = []
        for is_piece, run in groupby(ids, lambda index: index < size):
            if is_piece:
                parts.append(self._decode_pieces(run))
            else:
                parts += [self._added_tokens_decoder[index].content for index in run]
        text = " ".join(parts)
        return self.clean_up_tokenization(text) if self.clean_up_tokenization_spaces else text

    def _decode_pieces(self, ids: Iterable[int]) -> str:
        """Text between special pieces, a blank before what such a piece ends, as in 4.30."""
        text, run, specials = "", [], set(self.all_special_tokens)
        for index in ids:
            piece = self.pieces.id_to_piece(index)
            if piece not in specials:
                run.append(index)
                continue
            text += (f" {self.pieces.decode(run)}" if run else "") + piece
            run = []
        return text + self.pieces.decode(run)


def read_llama_tokenizer(
    directory: Path, model_type: str, vocabulary: int | None, *, always_legacy: bool = True
) -> LlamaPieceTokenizer | None:
    """The tokenizer of an LLM directory, or None if it is not of LLaMA's kind.

    `model_type`, of config.json, counts where its own files say nothing. Tokens past the LLM's `vocabulary` are plain
    text. `always_legacy`: as in 4.30, whatever `legacy` says. ValueError, with file and key, for contradictions.
    """
    config = read_json(directory / "tokenizer_config.json")
    converted = read_json(directory / "tokenizer.json")
    pieces = _pieces(directory, model_type, config, converted)
    if pieces is None:
        return None
    if config.get("sp_model_kwargs"):
        raise ValueError("tokenizer_config.json: sp_model_kwargs would change the ids; take them out")
    named, extra = _special_tokens(config, read_json(directory / "special_tokens_map.json"))
    _check_empty(directory, named)
    added = _added_tokens(directory, config, converted, pieces)
    tokens: dict[str, AddedToken] = {}
    for name, token in [*named.items(), *(("", token) for token in extra)]:
        if token is None or not token.content or (name == "unk_token" and not _is_piece(pieces, token.content)):
            continue
        if not (token.content in tokens and token.lstrip):
            tokens[token.content] = token
    ids = {content: index for content, (index, _) in added.items()}
    for content in tokens:
        if _is_piece(pieces, content):
            ids[content] = pieces.piece_to_id(content)
        elif content not in ids:
            ids[content] = max([pieces.get_piece_size() - 1, *ids.values()]) + 1
    tokens = {content: token for content, (_, token) in added.items()} | tokens
    past = [content for content in tokens if vocabulary is not None and ids[content] >= vocabulary]
    for name in ("bos_token", "eos_token"):
        if named[name] is not None and named[name].content in past:
            raise ValueError(f"{name} is {named[name].content!r}, which is not among the LLM's {vocabulary} tokens")
    if past:
        log.warning("%s: %s are past the LLM's %s tokens, and are plain text here", directory, past, vocabulary)
    adds_bos, adds_eos = _adds(directory, config, converted, model_type)
    if adds_bos and named["bos_token"] is None:
        raise ValueError('tokenizer_config.json: bos_token is null; set it to "<s>", or add_bos_token to false')
    special = {name: token for name, token in named.items() if name != "pad_token"}  # `$$` takes its place
    tokenizer = LlamaPieceTokenizer(
        pieces,
        {ids[content]: token for content, token in tokens.items() if content not in past},
        add_bos_token=adds_bos,
        add_eos_token=adds_eos,
        legacy=always_legacy or config.get("legacy") is not False,
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        chat_template=_chat_template(directory, config),
        name_or_path=str(directory),
        extra_special_tokens=[token for token in extra if token.content not in past],
        **{name: token for name, token in special.items() if token is None or token.content in ids.keys() - set(past)},
    )
    for name, token in special.items():  # those that are no tokens of their own: named so, with id 0
        if token is not None and token.content not in ids:
            setattr(tokenizer, name, token.content)
    return tokenizer


def _without_prefix(pieces: SentencePieceProcessor) -> SentencePieceProcessor:
    """The same model without the blank before a text."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(pieces.serialized_model_proto())
    proto.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def _is_piece(pieces: SentencePieceProcessor, content: str) -> bool:
    return pieces.id_to_piece(pieces.piece_to_id(content)) == content


def _check_empty(directory: Path, named: dict[str, AddedToken | None]) -> None:
    """Names that are "" together with that of the unknown token mean id 0; else 4.30 would add a token called ""."""
    empty = [name for name in _DEFAULTS if named[name] is not None and not named[name].content]
    if empty and "unk_token" not in empty:
        raise ValueError(f'tokenizer_config.json: {empty[0]} is ""; write {_DEFAULTS[empty[0]]!r}')
    if empty:
        text = "%s: special tokens are named '', which means id 0, as in the published code; name them <s> and </s>"
        log.warning(f"{text} in tokenizer_config.json for 1 and 2", directory)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the directory, {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: must be a JSON object, but is a {type(content).__name__}")
    return content


def _pieces(
    directory: Path, model_type: str, config: dict[str, Any], converted: dict[str, Any]
) -> SentencePieceProcessor | None:
    """SentencePiece's model of a LLaMA, whichever file holds it; under other names than LLaMA's with its options."""
    kind = str(config.get("tokenizer_class") or model_type)
    path = directory / "tokenizer.model"
    if path.is_file():
        proto = sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(path.read_bytes())
            pieces = SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as error:
            if "ByteLevel" in json.dumps(converted.get("pre_tokenizer")):
                return None  # LLaMA 3's file for tiktoken
            raise ValueError("tokenizer.model: is damaged, or no SentencePiece model") from error
        normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
        has_llama_options = (
            (trainer.model_type, trainer.byte_fallback, normalizer.add_dummy_prefix) == (trainer.BPE, True, True)
            and not normalizer.remove_extra_whitespaces
            and not normalizer.precompiled_charsmap
        )
        return pieces if "llama" in kind.lower() or has_llama_options else None
    return _rebuilt(directory, model_type, converted) if _is_converted(converted) else None


def _is_converted(converted: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is LLaMA's SentencePiece: BPE with bytes, and a blank before a text."""
    model = converted.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        return False
    prepended = f'"Prepend", "prepend": "{BLANK}"' in json.dumps(converted.get("normalizer"), ensure_ascii=False)
    scheme = json.dumps(converted.get("pre_tokenizer"))
    return prepended or (
        '"Metaspace"' in scheme and '"never"' not in scheme and '"add_prefix_space": false' not in scheme
    )


def _rebuilt(directory: Path, model_type: str, converted: dict[str, Any]) -> SentencePieceProcessor:
    """SentencePiece's model from the vocabulary and merges of a tokenizer.json, tried on sentences.

    A piece's score is the rank of the first merge that makes it, which is the order of the scores it was made from.
    """
    model, places = converted["model"], dict(sorted(converted["model"]["vocab"].items(), key=lambda item: item[1]))
    if list(places.values()) != list(range(len(places))):
        raise ValueError("tokenizer.json: its vocabulary's ids are not 0, 1, 2, ...; put tokenizer.model beside it")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    merges = _first_merge(places, merges, converted) + merges
    made = [places.get("".join(merge), -1) for merge in merges]
    if "llama" not in model_type.lower() and made == sorted(made) and BLANK * 2 in places:
        text = "tokenizer.json: transformers 5 wrote its merges in the order of ids, not of SentencePiece's scores"
        raise ValueError(f"{text}, in a {model_type}; put tokenizer.model beside it")  # as Mistral's
    ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges)))}
    special = {token["content"]: bool(token.get("special")) for token in converted.get("added_tokens") or []}
    unknown = model.get("unk_token") or _DEFAULTS["unk_token"]
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for piece in places:
        kind = kinds.NORMAL
        if piece == unknown:
            kind = kinds.UNKNOWN
        elif _BYTE.fullmatch(piece):
            kind = kinds.BYTE
        elif piece in special or piece in _DEFAULTS.values():
            kind = kinds.CONTROL if special.get(piece, True) else kinds.USER_DEFINED
        proto.pieces.add(piece=piece, score=-ranks.get(piece, len(ranks)), type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(places)
    trainer.unk_piece, trainer.unk_id = unknown, places[unknown]
    trainer.bos_id, trainer.eos_id, trainer.pad_id = places.get("<s>", -1), places.get("</s>", -1), -1
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", True, False
    pieces = SentencePieceProcessor(model_proto=proto.SerializeToString())

    plain = Tokenizer(BPE(places, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    for probe in PROBES:
        if plain.encode(probe).ids != pieces.encode(probe):
            raise ValueError(f"tokenizer.json: SentencePiece cuts {probe!r} otherwise; put tokenizer.model beside it")
    log.warning("%s: has no tokenizer.model; SentencePiece's model was rebuilt from tokenizer.json", directory)
    return pieces


def _first_merge(
    vocabulary: Mapping[str, int], merges: list[tuple[str, str]], converted: dict[str, Any]
) -> list[tuple[str, str]]:
    """Merges of the first piece, which older transformers left out of the file because its score is 0."""
    made = {"".join(merge) for merge in merges} | {token["content"] for token in converted.get("added_tokens") or []}
    splits = {
        piece: [(piece[:n], piece[n:]) for n in range(1, len(piece)) if {piece[:n], piece[n:]} <= vocabulary.keys()]
        for piece in vocabulary
        if piece not in made and not _BYTE.fullmatch(piece) and piece not in _DEFAULTS.values()
    }
    left_out = {piece: pairs for piece, pairs in splits.items() if pairs}
    symbols = [piece for piece, pairs in splits.items() if not pairs and len(piece) > 1]
    if len(left_out) > 1 or symbols:
        unknown = ", ".join(map(repr, [*symbols, *left_out][:4]))
        raise ValueError(f"tokenizer.json: no merge makes {unknown}; put tokenizer.model beside it")
    return [pair for pairs in left_out.values() for pair in pairs]


def _special_tokens(
    config: dict[str, Any], special_map: dict[str, Any]
) -> tuple[dict[str, AddedToken | None], list[AddedToken]]:
    """Special tokens by name, and those without one."""
    source = "tokenizer_config.json"
    named = {
        name: _token(f"{source}: {name}", config.get(name, _DEFAULTS.get(name)), name in _DEFAULTS) for name in _NAMES
    }
    extra = config.get("additional_special_tokens") or []
    for key, value in special_map.items():
        if key in _NAMES:
            named[key] = _token(f"special_tokens_map.json: {key}", value)
        elif key == "additional_special_tokens":
            source, extra = "special_tokens_map.json", value or []
    if named["pad_token"] is not None:  # the published code calls `$$` so, and this is an added token like others
        named["pad_token"] = _token(f"{source}: pad_token", named["pad_token"].content, special=False)
    if not isinstance(extra, list):
        raise ValueError(f"{source}: additional_special_tokens must be a list, but is {extra!r:.80}")
    tokens = [_token(f"{source}: additional_special_tokens", value) for value in extra]
    later = config.get("extra_special_tokens") or []  # transformers 5
    for value in later.values() if isinstance(later, dict) else later:
        tokens.append(_token("tokenizer_config.json: extra_special_tokens", value, keeps_blanks=True))
    return named, [token for token in tokens if token is not None]


def _token(place: str, value: Any, keeps_blanks: bool = False, special: bool = True) -> AddedToken | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = {"content": value, "lstrip": not keeps_blanks, "rstrip": not keeps_blanks}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{place} must be text, but is {value!r:.80}")
    blanks = {side: bool(value.get(side, False)) for side in ("lstrip", "rstrip")}
    return AddedToken(value["content"], **blanks, normalized=False, special=bool(value.get("special", special)))


def _added_tokens(
    directory: Path, config: dict[str, Any], converted: dict[str, Any], pieces: SentencePieceProcessor
) -> dict[str, tuple[int, AddedToken]]:
    """Id and token of what was added to the pieces, by content; added_tokens.json's word goes first, as in 4.30.

    What is a piece itself is no added token, whatever tokenizer.json calls it.
    """
    plain = read_json(directory / "added_tokens.json").items()
    listed, later = config.get("added_tokens_decoder") or {}, converted.get("added_tokens") or []
    if not isinstance(listed, dict) or not isinstance(later, list) or not all(isinstance(one, dict) for one in later):
        raise ValueError("added_tokens_decoder of tokenizer_config.json or added_tokens of tokenizer.json: no tokens")
    found = [("added_tokens.json", index, {"content": text, "lstrip": True, "rstrip": True}) for text, index in plain]
    found += [("tokenizer_config.json: added_tokens_decoder", index, token) for index, token in listed.items()]
    found += [("tokenizer.json: added_tokens", token.get("id"), token) for token in later]
    added: dict[str, tuple[int, AddedToken]] = {}
    for place, number, value in found:
        token = _token(place, value, special=False)
        try:
            index = int(number)
        except (TypeError, ValueError):
            raise ValueError(f"{place}: the id of {token.content!r} is {number!r}, not a number") from None
        if _is_piece(pieces, token.content):
            continue
        if not pieces.get_piece_size() <= index < 1 << 31:
            raise ValueError(f"{place}: {token.content!r} has id {index}, which is another piece of tokenizer.model")
        if added.setdefault(token.content, (index, token))[0] != index:
            raise ValueError(f"{place}: {token.content!r} has id {index}, elsewhere {added[token.content][0]}")
    return added


def _adds(directory: Path, config: dict[str, Any], converted: dict[str, Any], model_type: str) -> tuple[bool, bool]:
    """Whether bos goes before a text and eos behind it: what the configuration says; else, as in 4.30, bos and no eos.

    Where tokenizer.json is all there is, its eos counts, and its bos for others than LLaMAs.
    """
    processor = converted.get("post_processor")
    steps = [processor, *processor.get("processors", ())] if isinstance(processor, dict) else []
    template = next((json.dumps(step["single"]) for step in steps if "single" in step), "")
    before, _, behind = template.partition('"Sequence"')
    is_alone = not (directory / "tokenizer.model").is_file()
    adds_bos, adds_eos = True, is_alone and "SpecialToken" in behind
    if is_alone and processor is not None and "SpecialToken" not in before:
        adds_bos = "llama" in f"{config.get('tokenizer_class')} {model_type}".lower()
        if adds_bos and "add_bos_token" not in config:
            text = (
                "%s: tokenizer.json puts no bos before a text, but a LLaMA was trained with it, and so it is put there"
            )
            log.warning(f"{text}; add_bos_token: false in tokenizer_config.json switches it off", directory)
    return bool(config.get("add_bos_token", adds_bos)), bool(config.get("add_eos_token", adds_eos))


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """Template of conversations; of several named ones the default."""
    file = directory / "chat_template.jinja"
    try:
        template = file.read_text(encoding="utf-8-sig") if file.is_file() else config.get("chat_template")
    except ValueError as error:
        raise ValueError(f"{file.name}: is not UTF-8 text") from error
    if isinstance(template, list):
        template = {str(one.get("name")): one.get("template") for one in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"tokenizer_config.json: chat_template must be text, but is {template!r:.80}")
    return template
