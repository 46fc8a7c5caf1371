"""A LLaVA as llama.cpp reads it: a GGUF file of the LLM and one, `mmproj`, of CLIP and projector.

What is written is the `llava` layout of `transformers_layout` under llama.cpp's names: nothing here knows our own.
"""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerBase

from minigpt4.common.checkpoint import is_finite
from minigpt4.common.errors import MiniGPT4Error, WeightsError
from minigpt4.common.utils import install_command
from minigpt4.models.llama_tokenizer import LlamaPieceTokenizer
from minigpt4.models.tokenizer import start_ids
from minigpt4.models.transformers_layout import Plan, Planned

LANGUAGE_MODEL, PROJECTOR = "model.gguf", "mmproj.gguf"
_TEXT, _PROJECTION = "language_model.", "multi_modal_projector.linear_"
_GELUS = {"quick_gelu": False, "gelu": True, "gelu_new": True, "gelu_pytorch_tanh": True}
"""What llama.cpp's `clip.use_gelu` says for the activations of transformers; its GELU is the tanh one."""
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA3_SPLIT), ("ByteLevel", False)): "llama-bpe",
}
"""llama.cpp's names for how a tokenizer.json cuts text before its merges."""


def import_gguf() -> Any:
    """The package `gguf`; MiniGPT4Error without it."""
    try:
        import gguf
    except ImportError as error:
        raise MiniGPT4Error(f"--format gguf needs the package gguf: {install_command('gguf')}") from error
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf


def refuse_misfits(config: LlavaConfig, processor: LlavaProcessor, own: PreTrainedTokenizerBase) -> None:
    """WeightsError with everything in a LLaVA that llama.cpp has no place for."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters["rope_type"]
    cut = "SentencePiece" if isinstance(own, LlamaPieceTokenizer) else _pre_tokenizer(processor.tokenizer)
    rules = [
        (text.model_type in ("llama", "mistral"), f"an LLM of type {text.model_type}, not llama or mistral"),
        (text.hidden_act == "silu", f"an LLM with {text.hidden_act}, not silu"),
        (rope in ("default", "linear"), f"rope_type {rope}, not default or linear"),
        (not getattr(text, "sliding_window", None), "an LLM with a sliding window"),
        (cut, "a tokenizer that is neither SentencePiece nor byte-level BPE cut as GPT-2, SmolLM or LLaMA-3 do"),
        (vision.hidden_act in _GELUS, f"a tower with {vision.hidden_act}, not one of {', '.join(_GELUS)}"),
    ]
    if faults := [what for fits, what in rules if not fits]:
        raise WeightsError("--format gguf: llama.cpp's LLaVA has no place for " + "; ".join(faults))


def language_model(
    plan: Plan, config: LlavaConfig, processor: LlavaProcessor, own: PreTrainedTokenizerBase, dtype: torch.dtype
) -> tuple[Any, Plan]:
    """The file of the LLM without tensors, and these by llama.cpp's names.

    Args:
        plan: of the `llava` layout, as its config and processor are.
        own: the model's tokenizer, which says what the processor's does not: SentencePiece's scores.
        dtype: of matrices; norms and biases are fp32.
    """
    gguf, text = import_gguf(), config.text_config
    writer = _writer("llama", dtype)
    writer.add_type(gguf.GGUFType.MODEL)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    if text.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(text.rope_parameters["factor"])
    _add_vocabulary(writer, processor, own, text.vocab_size)

    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text.num_hidden_layers)
    tensors: Plan = {}
    for name, planned in plan.items():
        if not name.startswith(_TEXT):
            continue
        layer = name.split(".")[-2]
        turned = partial(_by_pairs, heads=heads[layer]) if layer in heads else None
        tensors[_named(names, name.removeprefix(_TEXT))] = _as_written(planned, dtype, turned)
    return writer, tensors


def mmproj(plan: Plan, config: LlavaConfig, processor: LlavaProcessor, dtype: torch.dtype) -> tuple[Any, Plan]:
    """The file of tower and projector without tensors, and these by llama.cpp's names.

    There, a GELU stands between the projector's layers always. Where ours has none (`linear`), the first layer W is
    written as [W; -W] and the second, V, as [V, -V]: gelu(x) - gelu(-x) = x.
    """
    gguf, vision = import_gguf(), config.vision_config
    layer = config.vision_feature_layer
    depth = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    writer = _writer("clip", dtype)
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(depth)
    writer.add_array("clip.vision.feature_layer", [depth])
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_mean([float(value) for value in processor.image_processor.image_mean])
    writer.add_vision_image_std([float(value) for value in processor.image_processor.image_std])
    writer.add_vision_use_gelu(_GELUS[vision.hidden_act])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    tensors: Plan = {}
    for name, planned in plan.items():
        if name.startswith(_TEXT) or ".post_layernorm." in name or ".head." in name:
            continue
        if name.startswith(_PROJECTION):
            number, kind = name.removeprefix(_PROJECTION).split(".")
            if config.projector_hidden_act == "linear":
                planned = _without_gelu(planned, number, kind)
            tensors[f"mm.{2 * int(number) - 2}.{kind}"] = _as_written(planned, dtype)
        elif ".layers." not in name or int(name.partition(".layers.")[2].partition(".")[0]) < depth:
            exact = ".embeddings." in name and dtype != torch.float16  # a convolution is of these two
            tensors[_named(names, name)] = _as_written(planned, torch.float32 if exact else dtype)
    return writer, tensors


def write_gguf(writer: Any, tensors: Plan, path: Path, dry: bool) -> int:
    """Write a file tensor by tensor; returns its bytes. `dry`: the file is removed again, and no tensor made."""
    gguf = import_gguf()
    types = {torch.bfloat16: gguf.GGMLQuantizationType.BF16, torch.float16: gguf.GGMLQuantizationType.F16}
    quantized = {name: types.get(own.dtype, gguf.GGMLQuantizationType.F32) for name, own in tensors.items()}
    for name, own in tensors.items():
        size = own.shape.numel() * own.dtype.itemsize
        writer.add_tensor_info(name, list(own.shape), None, size, raw_dtype=quantized[name])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, own in tensors.items() if not dry else ():
        tensor = own.make()
        if not is_finite(tensor.to(own.dtype)):
            raise WeightsError(f"{name}: not finite in {own.dtype}; take another --precision")
        writer.write_tensor_data(gguf.quantize(tensor.float().contiguous().numpy(), quantized[name]))
    writer.flush()
    writer.close()
    pad = partial(gguf.GGUFWriter.ggml_pad, n=gguf.GGUF_DEFAULT_ALIGNMENT)
    if not dry:
        return path.stat().st_size
    size = pad(path.stat().st_size) + sum(pad(own.shape.numel() * own.dtype.itemsize) for own in tensors.values())
    path.unlink()
    return size


def _writer(kind: str, dtype: torch.dtype) -> Any:
    gguf = import_gguf()
    types = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer = gguf.GGUFWriter(None, kind)
    writer.add_file_type(gguf.LlamaFileType[types[dtype]])
    return writer


def _named(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise WeightsError(f"--format gguf: llama.cpp's LLaVA has no place for the tensor {name}")
    return found


def _as_written(planned: Planned, dtype: torch.dtype, change: Callable[[Tensor], Tensor] | None = None) -> Planned:
    """Vectors as fp32."""
    wanted = dtype if len(planned.shape) > 1 else torch.float32
    return Planned(planned.shape, wanted, lambda: change(planned.make()) if change else planned.make())


def _by_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as llama.cpp turns them: 2i with 2i + 1, not i with i + D / 2."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _without_gelu(planned: Planned, number: str, kind: str) -> Planned:
    """A part of a projector without an activation, for one with GELU."""
    if (number, kind) == ("2", "bias"):
        return planned
    axis = 0 if number == "1" else 1
    shape = torch.Size(size * 2 if place == axis else size for place, size in enumerate(planned.shape))

    def both() -> Tensor:
        own = planned.make()
        return torch.cat([own, -own], dim=axis)

    return Planned(shape, planned.dtype, both)


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """llama.cpp's name for how a byte-level BPE cuts text, None for any other tokenizer."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    cut, model = whole["pre_tokenizer"] or {}, whole["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or whole["normalizer"]:
        return None
    steps = []
    for step in cut.get("pretokenizers", [cut]):
        if step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            steps.append(("ByteLevel", step["use_regex"]))
        elif step.get("type") == "Digits":
            steps.append(("Digits", step["individual_digits"]))
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(("Split", step["pattern"].get("Regex")))
        else:
            return None
    name = _PRE_TOKENIZERS.get(tuple(steps))
    return name if model["ignore_merges"] == (name == "llama-bpe") else None


def _add_vocabulary(writer: Any, processor: LlavaProcessor, own: PreTrainedTokenizerBase, rows: int) -> None:
    """Tokens, what they are, and what stands around a text; a row without a token is `[PADn]`."""
    kinds, theirs = import_gguf().TokenType, processor.tokenizer
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [kinds.UNUSED] * rows
    if isinstance(own, LlamaPieceTokenizer):
        proto = sentencepiece_model_pb2.ModelProto.FromString(own.pieces.serialized_model_proto())
        scores = [-10000.0] * rows
        for row, piece in enumerate(proto.pieces[:rows]):
            tokens[row], scores[row], types[row] = piece.piece, piece.score, kinds(piece.type)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
    else:
        for token, row in theirs.get_vocab().items():
            tokens[row], types[row] = token, kinds.NORMAL
        merges = json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(theirs))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for row, token in theirs.added_tokens_decoder.items():
        if types[row] in (kinds.UNUSED, kinds.NORMAL):
            tokens[row], types[row] = token.content, kinds.CONTROL if token.special else kinds.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(theirs, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(bool(start_ids(own)))
    writer.add_add_eos_token(False)
    template = processor.chat_template
    writer.add_chat_template(template if isinstance(template, str) else template["default"])
