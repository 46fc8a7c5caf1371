"""The frozen LLM: loaded once, straight onto its device, refused where it cannot be what it claims to be.

Any causal LM that transformers reads from a local directory works; Vicuna v0, LLaMA and LLaMA-2 are what the
published checkpoints were trained with.
"""

import hashlib
import inspect
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Cache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from minigpt4.common.checkpoint import read_weights, some
from minigpt4.common.errors import WeightsError, errors_as
from minigpt4.common.model_schema import TrainRule
from minigpt4.common.torch_files import check_torch_file, reads_pickles, require_shards
from minigpt4.common.utils import install_command
from minigpt4.models.attention import attention_for, enable_activation_checkpointing
from minigpt4.models.base_model import DTYPES, freeze
from minigpt4.models.fsdp import load_sharded

log = logging.getLogger(__name__)

SANITY_SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm afternoon sun."
UNIFORM_MARGIN = 0.05
"""Nats. A loss this close to ln(vocabulary) means logits without information: zero or missing weights."""
WEAK_SHARE = 0.75
DELTA_NORM_LIMIT = 0.02
"""Mean absolute RMSNorm weight of a delta file (the difference of two finetuned models) stays far below."""
FINGERPRINT_ROWS = 256
LLAVA_PARTS = ("model.mm_projector.", "model.vision_tower.")
"""What LLaVA saves beside the tensors of its LLM."""
_QUANTISED = ("int8", "nf4")
_LIMITS = {"vocab_size": 1 << 24, "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_hidden_layers": 1 << 10}
_LIMITS |= {"num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 14}
_LIMITS |= {"num_local_experts": 1 << 10, "max_position_embeddings": 1 << 30}
"""Largest numbers of config.json; the largest LLMs stay far below."""


def read_llm_config(directory: Path) -> PretrainedConfig:
    """config.json of an LLM directory, without its token ids: Vicuna v0's are wrong, the tokenizer's count.

    WeightsError for what transformers has not, quantised weights, an adapter, a model that brings its own code.
    """
    key = f"model.llama_model: {directory}"
    if not directory.is_dir():
        way_out = "python scripts/download_weights.py --list names some"
        raise WeightsError(f"{key} is not a directory, of an LLM as transformers saves it; {way_out}")
    if (directory / "adapter_config.json").is_file():
        text = "has an adapter_config.json: LoRA. LLaVA's goes into model.ckpt (docs/training.md); merge another into"
        raise WeightsError(f"{key} {text} its LLM first (peft: merge_and_unload, save_pretrained)")
    if not (directory / "config.json").is_file():
        raise WeightsError(f"{key} has no config.json")
    with errors_as(WeightsError, f"{key}/config.json"):
        raw, _ = PretrainedConfig.get_config_dict(directory, local_files_only=True)
        if "model_type" not in raw:
            raise ValueError("it names no model_type")
        if quantised := raw.get("quantization_config"):
            method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
            way_out = "take those of 16 bits and set model.llm_precision: int8 or nf4"
            raise ValueError(f"its weights are quantised already ({method}), which is not read here; {way_out}")
        if raw["model_type"] not in CONFIG_MAPPING and not is_llava(raw):
            of_llava = "mm_vision_tower" in raw
            way_out = "of LLaVA's kind those on a LLaMA are read" if of_llava else "take an LLM that transformers has"
            no_code = "; code of a directory (auto_map) is never run" if "auto_map" in raw else ""
            raise ValueError(f"transformers has no model type {raw['model_type']!r}{no_code}; {way_out}")
        if raw["model_type"].startswith(("llava", "vipllava")) and "text_config" in raw:
            raise ValueError("it is a LLaVA in the layout of transformers (llava-hf); take one in LLaVA's own layout")
        if is_llava(raw) and raw.get("mm_patch_merge_type", "flat") != "flat":
            raise ValueError("it is a LLaVA 1.6 (NeXT), which sees an image in tiles; v1 and 1.5 are read")
        if is_llava(raw):  # a LLaMA and a few more tensors
            raw |= {"model_type": "llama"}
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        config = AutoConfig.for_model(**(raw | ids))
        for name, limit in _LIMITS.items():
            value = getattr(config.get_text_config(), name, None)
            if value is not None and not (isinstance(value, int) and 0 < value <= limit):
                raise ValueError(f"{name}: {value!r:.40} must be a whole number from 1 to {limit:,}")
        return config


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of a whole model in LLaVA's own layout."""
    return config.get("model_type") in ("llava", "llava_llama") and "text_config" not in config


def _holds_llava(config: PretrainedConfig) -> bool:
    return hasattr(config, "mm_vision_tower")


def load_llm(
    directory: str | Path,
    precision: str,
    device: torch.device,
    *,
    nf4_dtype: torch.dtype = torch.float16,
    attention: str | None = None,
    grad_checkpoint: bool = False,
    sharded: bool = False,
    rule: TrainRule | None = None,
) -> nn.Module:
    """The frozen causal LM of `directory` in fp16, bf16, fp32, int8 or nf4 on `device`, its files mapped.

    `nf4_dtype`: what nf4 computes in, and the type of the weights that stay whole.
    `sharded`: its layers are spread over the processes of the run, each of which must call this, and ready for `rule`;
    not for int8 and nf4. WeightsError for a Vicuna delta, missing files, tensors that do not fit config.json.
    """
    directory = Path(directory).expanduser()
    config = read_llm_config(directory)
    if re.search(r"delta([-_]v[\d.]+)?$", directory.resolve().name.lower()):
        raise _delta_error(directory, "its name says so")
    attention = attention or attention_for(device)
    with errors_as(WeightsError, f"model.llama_model: {directory} does not load"):
        require_shards(directory)
        _refuse_small_files(directory, config.get_text_config())
        if sharded:
            model, report = load_sharded(directory, config, DTYPES[precision], device, attention, rule)
        else:
            with _silent_about_llava(config):
                storage = _storage(precision, device, nf4_dtype)
                model, report = _load_whole(directory, config, storage, device, attention)
        _refuse_partial(directory, config, report)
        _refuse_delta_weights(directory, model)
        if not sharded:
            freeze(model)
        if grad_checkpoint:
            enable_activation_checkpointing(model)
    return model


def _load_whole(
    directory: Path, config: PretrainedConfig, storage: dict[str, Any], device: torch.device, attention: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what its files lack or have too much."""
    try:
        if reads_pickles(directory):
            log.info("Pickled weights: python scripts/to_safetensors.py %s converts them once", directory)
            for file in directory.glob("pytorch_model*.bin"):
                check_torch_file(file, sums=False)
        return AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            device_map={"": device},
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # `_refuse_partial` names them
            local_files_only=True,
            attn_implementation=attention,
            **storage,
        )
    except Exception as error:
        if (fault := _broken_file(directory)) is None:
            raise
        raise WeightsError(f"model.llama_model: {fault}") from error


@contextmanager
def _silent_about_llava(config: PretrainedConfig) -> Iterator[None]:
    """transformers warns of each tensor of a LLaVA that is not its LLM's; `_refuse_partial` names those of no part."""
    speaker = logging.getLogger("transformers.modeling_utils")

    def is_other(said: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(said.msg)

    if _holds_llava(config):
        speaker.addFilter(is_other)
    try:
        yield
    finally:
        speaker.removeFilter(is_other)


def _refuse_small_files(directory: Path, config: PretrainedConfig) -> None:
    """WeightsError for files that are too small for config.json, whose gaps would be filled with noise of any size."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in directory.glob(pattern)]
    held = sum(file.stat().st_size for file in files)
    vocabulary, width, inner, layers = (getattr(config, name, None) or 0 for name in list(_LIMITS)[:4])
    least = width * (vocabulary + layers * inner)
    if files and least > 2 * held:  # not even half a byte for each number
        sizes = f"describes more than {least:,} parameters, but the weights files have {held:,} bytes"
        raise WeightsError(f"model.llama_model: {_broken_file(directory) or f'{directory}/config.json {sizes}'}")


def _broken_file(directory: Path) -> str | None:
    """What is wrong with the first weights file that cannot be read; transformers' errors name none."""
    for path in sorted([*directory.glob("model*.safetensors"), *directory.glob("pytorch_model*.bin")]):
        try:
            read_weights(path)
        except WeightsError as error:
            return str(error)
    return None


def _storage(precision: str, device: torch.device, nf4_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a precision."""
    if precision not in _QUANTISED:
        return {"dtype": DTYPES[precision]}
    if device.type != "cuda":
        way_out = f"but the model goes to {device}; use bf16 or fp32 there (and low_resource: False)"
        raise WeightsError(f"model.llm_precision: {precision} needs a CUDA GPU (bitsandbytes), {way_out}")
    if find_spec("bitsandbytes") is None:
        raise WeightsError(f"model.llm_precision: {precision} needs bitsandbytes: {install_command('gpu')}")
    if precision == "int8":
        return {"dtype": torch.float16, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": nf4_dtype}
    return {"dtype": nf4_dtype, "quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4)}


def _refuse_delta_weights(directory: Path, model: nn.Module) -> None:
    """Norms of a model scale by the order of 0.1 to 1; those of a delta are differences near zero.

    What counts is what a norm does to numbers of size 1: Gemma stores w and scales by 1 + w.
    """
    sizes = []
    for name, norm in model.named_modules():
        weight = getattr(norm, "weight", None)
        if "norm" in name and isinstance(weight, torch.Tensor) and weight.ndim == 1:
            signs = torch.ones_like(weight)
            signs[1::2] = -1  # mean 0, size 1
            sizes.append(norm(signs[None]).float().abs().mean())
    mean = torch.stack(sizes).mean().item() if sizes else DELTA_NORM_LIMIT
    if mean < DELTA_NORM_LIMIT and bool(model.get_input_embeddings().weight.abs().max() > 0):
        raise _delta_error(directory, f"the mean size of its norm weights is {mean:.4f}")


def _delta_error(directory: Path, why: str) -> WeightsError:
    return WeightsError(
        f"model.llama_model: {directory} is a delta, not a model ({why}). Add LLaMA to a Vicuna delta first:\n"
        "  python -m fastchat.model.apply_delta --base LLAMA_DIR --delta DELTA_DIR --target VICUNA_DIR\n"
        "or take merged weights: docs/weights.md"
    )


def _refuse_partial(directory: Path, config: PretrainedConfig, report: Any) -> None:
    """`from_pretrained` fills absent tensors with noise and goes on; here that is an error."""
    known = ("rotary_emb.inv_freq", *LLAVA_PARTS) if _holds_llava(config) else ("rotary_emb.inv_freq",)
    faults = {
        "missing": sorted(report["missing_keys"]),
        "wrong shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
        "not expected": sorted(k for k in report["unexpected_keys"] if not any(part in k for part in known)),
    }
    if any(faults.values()):
        parts = "; ".join(f"{title} {some(names, 4)} ({len(names)})" for title, names in faults.items() if names)
        raise WeightsError(f"model.llama_model: the weights in {directory} do not fit its config.json: {parts}")


def cache_arguments(model: nn.Module, cache: Cache) -> dict[str, Any]:
    """Arguments of a forward pass that reads keys and values of a cache and adds its own.

    transformers 5.24 renamed `past_key_values` to `cache`; a version takes the other name for one of no meaning.
    """
    names = inspect.signature(model.forward).parameters
    return {"use_cache": True, "cache" if "cache" in names else "past_key_values": cache}


def set_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, beams_count_bos: bool = True) -> None:
    """Let the generation settings follow the tokenizer; sampling defaults of the directory are dropped.

    `beams_count_bos`: of beam_search.py.
    """
    stored = model.generation_config
    ends = stored.eos_token_id if stored is not None else None
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends
    if isinstance(ends, list) and eos in ends:
        eos = ends  # chat models that end a turn and a text by different tokens
    fill = getattr(stored, "pad_token_id", None)  # after the end of a row, as published
    fill = fill if fill is not None and fill >= 0 else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=fill)
    model.generation_config.beams_count_bos = beams_count_bos


@torch.no_grad()
def add_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Give those of `tokens` that the tokenizer lacks an id, and rows that are the mean of all others in the LLM."""
    known = tokenizer.get_vocab()
    names = [AddedToken(token, normalized=False, special=True) for token in tokens if token not in known]
    if not names:
        return
    tokenizer.add_tokens(names, special_tokens=True)
    first, rows = len(tokenizer) - len(names), model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(max(rows, len(tokenizer)), mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[first : len(tokenizer)] = table.weight[:first].mean(dim=0)
    freeze(model)


def first_token(model: nn.Module) -> int:
    """What every output starts with: bos, or padding for an LLM without bos."""
    ids = model.generation_config
    return ids.bos_token_id if ids.bos_token_id is not None else ids.pad_token_id


def end_tokens(model: nn.Module) -> list[int]:
    """Ids that end an answer."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def fingerprint(model: nn.Module) -> str:
    """Short hash of what an LLM is: its first embeddings and its norms, rounded to bf16.

    The same for all file formats and 16-bit precisions of one LLM, another one for another finetuning.
    """
    vectors = [p for name, p in sorted(model.named_parameters()) if p.ndim == 1 and name.endswith("norm.weight")]
    rows = model.get_input_embeddings().weight[:FINGERPRINT_ROWS]
    return hashlib.sha256(b"".join(map(bf16_bytes, (rows, *vectors)))).hexdigest()[:16]


def bf16_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor rounded to bf16, for hashes that are the same for all formats of a file."""
    return tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def check_llm(model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> float:
    """The LLM's loss on an English sentence; WeightsError if it is not finite or that of a uniform guess.

    People trained for days on an LLM that had not loaded (loss 10.37 = ln 32000).
    """
    ids = tokenizer(SANITY_SENTENCE, return_tensors="pt").input_ids.to(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    loss = nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    uniform = math.log(model.get_output_embeddings().weight.shape[0])
    if not math.isfinite(loss) or abs(loss - uniform) < UNIFORM_MARGIN:
        text = f"the LLM's loss on an English sentence is {loss:.3f}, a uniform guess has {uniform:.3f}"
        way_out = "its weights are zero or broken; get them again and compare their sizes with docs/weights.md"
        raise WeightsError(f"model.llama_model: {directory} cannot be right: {text}; {way_out}")
    if loss > WEAK_SHARE * uniform:
        text = "%s reads English with a loss of %.2f (a uniform guess has %.2f): untrained, or the wrong tokenizer?"
        log.warning(text, directory, loss, uniform)
    return loss
