"""`python -m minigpt4.merge`: a checkpoint whose LLM was trained, as a directory that any program of its kind reads.

    python -m minigpt4.merge --cfg-path RECIPE --ckpt output/.../checkpoint_0.pth --output DIR [--layout llava]

`--layout llm`: the merged LLM as transformers saves it, and what else was trained in `projection.pth`; both serve as
`model.llama_model: DIR`, `model.ckpt: DIR/projection.pth` without `train.llm`. `--layout llava`: a whole LLaVA.
`--layout lora`: the folder of LLaVA's LoRA runs, nothing merged. A projection trained alone becomes `mm_projector.bin`.
The LLM is read and written tensor by tensor.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from minigpt4.common.checkpoint import find_weights, is_finite
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, WeightsError, errors_as
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.common.logger import setup_logger
from minigpt4.common.model_schema import TrainRule
from minigpt4.common.utils import exit_status
from minigpt4.models.base_model import DTYPES
from minigpt4.models.fsdp import mapped_weights
from minigpt4.models.llava_weights import (
    ADAPTERS,
    NOT_LORA,
    TOWER,
    to_adapter_names,
    to_projector_names,
    whole_projection,
)
from minigpt4.models.llm import LLAVA_PARTS, is_llava, read_llm_config, set_token_ids
from minigpt4.models.loading import meta_vision, trained_weights
from minigpt4.models.mini_gpt4 import VisionLanguageModel
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.models.train_rules import ADAPTER, OF_PEFT_MODEL
from minigpt4.models.transformers_layout import Plan, Planned
from minigpt4.models.vision_tower import read_vit_weights

log = logging.getLogger(__name__)

SHARD_SIZE = "5GB"
INDEX = "model.safetensors.index.json"
BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "vocab.*", "merges.*")
"""Files of an LLM's directory that its merged form keeps."""
PROJECTION = "projection.pth"


def merged_llm(base: Mapping[str, Tensor], trained: Mapping[str, Tensor], rule: TrainRule, dtype: torch.dtype) -> Plan:
    """The LLM's tensors with what was trained of them, under the names of its directory.

    Adapters are added as peft does: W + alpha / r B A.
    """
    making: Plan = {}
    for name, weight in base.items():
        layer = f"llama_model.{OF_PEFT_MODEL}{name.removesuffix('.weight')}"
        pair = [trained.get(f"{layer}.lora_{letter}.{ADAPTER}.weight") for letter in "BA"]
        own = trained.get(f"llama_model.{name}", weight)
        making[name] = Planned(weight.shape, dtype, lambda own=own, pair=pair: _with_adapter(own, pair, rule))
    return making


def without_storage(cfg: Any) -> tuple[VisionLanguageModel, PretrainedConfig, dict[str, Tensor]]:
    """A model that knows names, tokens and fingerprints, but holds no weights; the config of its LLM, and that LLM's
    tensors, left on disk until they are read."""
    directory = cfg.llm_directory()
    config, base = read_llm_config(directory), mapped_weights(directory)
    tokenizer = load_tokenizer(directory, **cfg.TOKENIZER)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
        model = VisionLanguageModel(cfg, *meta_vision(cfg), llm, tokenizer)
    with errors_as(WeightsError, f"model.llama_model: {directory}"):
        if (directory / "generation_config.json").is_file():
            llm.generation_config = GenerationConfig.from_pretrained(directory)
        set_token_ids(llm, tokenizer)
        llm.load_state_dict(base, strict=False, assign=True)  # mapped, for the fingerprint
    return model, config, base


def own_tensors(base: Mapping[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors of an LLM's directory without buffers, what a LLaVA has beside them, and a tied output layer."""
    tied = bool(getattr(config, "tie_word_embeddings", False))
    dropped = ("rotary_emb.inv_freq", *LLAVA_PARTS, *["lm_head.weight"] * tied)
    return {name: tensor for name, tensor in base.items() if not any(part in name for part in dropped)}


def _with_adapter(weight: Tensor, pair: list[Tensor | None], rule: TrainRule) -> Tensor:
    if pair[0] is None:
        return weight
    up, down = (part.float() for part in pair)
    return weight.float() + rule.alpha / len(down) * (up @ down)


def shards(making: Plan) -> StateDictSplit:
    """Which file of `model.safetensors`, or of several with an index, has which tensors."""
    empty = {name: torch.empty(own.shape, dtype=own.dtype, device="meta") for name, own in making.items()}
    return split_torch_state_dict_into_shards(empty, max_shard_size=SHARD_SIZE)


def write_sharded(making: Plan, folder: Path) -> None:
    """Write the files of `shards`, each made and written before the next."""
    plan = shards(making)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: making[name].make().to(making[name].dtype).contiguous() for name in names}
        if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
            raise WeightsError(f"{broken[0]}: not finite in {making[broken[0]].dtype}; take another --precision")
        save_file(tensors, folder / file, metadata={"format": "pt"})
        log.info("Wrote %s, %d tensors", folder / file, len(names))
    if plan.is_sharded:
        (folder / INDEX).write_text(shard_index(plan))


def shard_index(plan: StateDictSplit) -> str:
    """The content of `model.safetensors.index.json`."""
    return json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}, indent=2)


def llava_config(cfg: LlavaConfig, vision_width: int) -> dict[str, Any]:
    """What LLaVA's config.json says beside the LLM's."""
    return {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "use_mm_proj": True,
        "mm_vision_tower": cfg.vit_model,
        "mm_hidden_size": vision_width,
        "mm_projector_type": cfg.projection,
        "mm_projector_lr": cfg.train.projection.lr,
        "mm_vision_select_layer": cfg.vit_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "tune_mm_mlp_adapter": cfg.is_frozen("llama_model"),
        "freeze_mm_mlp_adapter": cfg.is_frozen("llama_proj"),
        **{key: getattr(cfg, key) for key in ("mm_use_im_start_end", "mm_use_im_patch_token", "image_aspect_ratio")},
        **{key: getattr(cfg, key) for key in ("tokenizer_model_max_length", "tokenizer_padding_side")},
    }


def merge(cfg: Any, checkpoint: Path, output: Path, layout: str, precision: str | None = None) -> None:
    """Write what a checkpoint of the model of `cfg` trained into the new folder `output`, see the module."""
    if layout != "llm" and not isinstance(cfg, LlavaConfig):
        raise ConfigError(f"--layout {layout}: is for arch: llava")
    if cfg.new_tokens:
        raise ConfigError("model.mm_use_im_start_end, mm_use_im_patch_token: an LLM with new tokens is not merged here")
    model, llm_config, base = without_storage(cfg)
    state, rule = trained_weights(model.stored_parameters(), checkpoint, cfg, model.made_with()), cfg.train.llm
    of_llm = {name: tensor for name, tensor in state.items() if name.startswith("llama_model.")}
    others = {name: tensor for name, tensor in state.items() if name not in of_llm} or whole_projection(cfg)
    if layout == "lora" and not rule.is_lora:
        raise ConfigError(f"--layout lora: model.train.llm is {rule.rule}")
    if layout == "llm" and not of_llm and not isinstance(cfg, LlavaConfig):
        raise ConfigError(f"--ckpt {checkpoint}: nothing of its LLM was trained; model.ckpt reads it as it is")
    if layout != "llm" and (left := [name for name in others if not name.startswith("llama_proj.")]):
        raise ConfigError(f"--layout {layout}: has no place for {left[0]}; take llm")
    if layout != "lora" and not others and cfg.projection != "identity":
        raise WeightsError(f"{checkpoint}: holds no projection")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output {output}: is not empty")
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(cfg, LlavaConfig) and layout != "lora":
        torch.save(to_projector_names(others), output / "mm_projector.bin")
    if not of_llm and layout == "llm":
        return
    directory = cfg.llm_directory()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8-sig"))
    precision = precision or (cfg.llm_storage if cfg.llm_storage in DTYPES else "fp16")
    config |= dict.fromkeys(("dtype", "torch_dtype"), str(DTYPES[precision]).removeprefix("torch."))
    if is_llava(config):  # a whole one is the LLM's directory
        config = {key: value for key, value in config.items() if not key.startswith("mm_")}
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if layout != "llm":
        config |= llava_config(cfg, model.Qformer.feature_width)
    if layout == "lora":
        _write_lora(cfg, of_llm, others, output)
    else:
        making = merged_llm(own_tensors(base, llm_config), of_llm, rule, DTYPES[precision])
        if layout == "llava":
            parts = to_projector_names(others)
            parts |= {f"model.{TOWER}vision_model.{n}": t for n, t in read_vit_weights(cfg)[1].items()}
            making |= {name: Planned.of(tensor, DTYPES[precision]) for name, tensor in parts.items()}
        else:
            torch.save({"model": others}, output / PROJECTION)
        write_sharded(making, output)
        for file in (file for pattern in BESIDE for file in directory.glob(pattern)):
            shutil.copy(file, output / file.name)
    (output / "config.json").write_text(json.dumps(config, indent=2))


def _write_lora(cfg: LlavaConfig, of_llm: dict[str, Tensor], others: dict[str, Tensor], output: Path) -> None:
    rule, adapters = cfg.train.llm, to_adapter_names(of_llm)
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in adapters}
    facts = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    facts |= {"base_model_name_or_path": cfg.llama_model, "target_modules": sorted(layers), "r": rule.r}
    facts |= {"lora_alpha": rule.alpha, "lora_dropout": rule.dropout}
    save_file({n: t.contiguous() for n, t in adapters.items()}, output / ADAPTERS[0], metadata={"format": "pt"})
    (output / "adapter_config.json").write_text(json.dumps(facts, indent=2))
    torch.save(to_projector_names(others, f"{OF_PEFT_MODEL}model."), output / NOT_LORA)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="the recipe that trained it, or the run.json of its folder")
    parser.add_argument("--ckpt", required=True, help="checkpoint of the run, or LLaVA's adapter_model file")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    parser.add_argument("--layout", choices=("llm", "llava", "lora"), default="llm")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="of the written LLM; else model.llm_precision")
    parser.add_argument("--options", nargs="+", default=[], help="KEY=VALUE over the file")
    args = parser.parse_args(argv)
    setup_logger()

    def run() -> None:
        model = Config(args).validate(training=False).model
        checkpoint = find_weights(args.ckpt, "--ckpt", "")
        merge(model, checkpoint, args.output, args.layout, args.precision)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
