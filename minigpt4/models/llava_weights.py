"""Weights in LLaVA's own layouts: `mm_projector.bin`, a whole model in one directory, and the folder of a LoRA run
(`adapter_model` and `adapter_config.json` of peft, `non_lora_trainables.bin`)."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from minigpt4.common.checkpoint import read_state_dict
from minigpt4.common.errors import WeightsError, errors_as
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.common.torch_files import refuse_pointer, require_shards
from minigpt4.models.llm import is_llava
from minigpt4.models.train_rules import ADAPTER, OF_PEFT_MODEL

log = logging.getLogger(__name__)

PROJECTOR = "mm_projector."
TOWER = "vision_tower.vision_tower."
"""What stands before the names of a part, after whatever wrapped it."""
_SAME_AS = {
    "mm_projector_type": "projection",
    "mm_vision_select_layer": "vit_layer",
    "mm_use_im_start_end": "mm_use_im_start_end",
}
"""Keys of LLaVA's config.json, and of the section `model:`, that must agree."""
_PIXELS = {"mm_vision_tower": "vit_model", "image_aspect_ratio": "image_aspect_ratio"}
"""Those that should: towers of one width are all read, and a recipe may choose another form of images."""


def cut_names(state: Mapping[str, Tensor], part: str, name: str = "") -> dict[str, Tensor]:
    """The tensors of a `part` of LLaVA under names of their own, which begin with `name`."""
    return {name + key.partition(part)[2]: tensor for key, tensor in state.items() if part in key}


def projector_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a LLaVA's projector under the names of this program, all others as they are."""
    others = {name: tensor for name, tensor in state.items() if PROJECTOR not in name}
    return cut_names(state, PROJECTOR, "llama_proj.") | others


ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
NOT_LORA = "non_lora_trainables.bin"
_OF_LLM = f"llama_model.{OF_PEFT_MODEL}"
_PLAIN = {"bias": "none", "peft_type": "LORA"}
_UNREAD = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


def adapter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft's names of adapters in a file -> names of checkpoints; `to_adapter_names` is the other way."""
    stems = {key: key.removesuffix(".weight").removesuffix(f".{ADAPTER}") for key in state}
    return {f"llama_model.{stems[key]}.{ADAPTER}.weight": tensor for key, tensor in state.items()}


def to_adapter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters among the trained weights of a checkpoint, as peft names them in a file."""
    lora = {name: tensor for name, tensor in state.items() if name.startswith(_OF_LLM)}
    return {n.removeprefix("llama_model.").replace(f".{ADAPTER}.weight", ".weight"): t for n, t in lora.items()}


def to_projector_names(state: Mapping[str, Tensor], before: str = "model.") -> dict[str, Tensor]:
    """The projection among the trained weights of a checkpoint, as LLaVA names it."""
    own = {name.removeprefix("llama_proj."): t for name, t in state.items() if name.startswith("llama_proj.")}
    return {f"{before}{PROJECTOR}{name}": tensor for name, tensor in own.items()}


def read_lora(path: Path) -> dict[str, Any]:
    """The folder around an `adapter_model` file, as the content of a checkpoint; WeightsError for other than LoRA."""
    file, beside = path.with_name("adapter_config.json"), path.with_name(NOT_LORA)
    with errors_as(WeightsError, f"{file}: cannot be read"):
        config = json.loads(file.read_text(encoding="utf-8"))
        odd = [key for key, value in _PLAIN.items() if config.get(key, value) != value]
        if odd := odd + [key for key in _UNREAD if config.get(key)]:
            raise WeightsError(f"{file}: {odd[0]}: {config[odd[0]]!r} is not read here; only LoRA of linear layers is")
        alpha = {"llm": float(config["lora_alpha"])}
    state = adapter_names(read_state_dict(path))
    if beside.is_file():
        others = read_state_dict(beside)
        if left := [name for name in others if PROJECTOR not in name]:
            raise WeightsError(f"{beside}: {left[0]} is no weight of a projector")
        state |= projector_names(others)
    return {"model": state, "state": {"made_with": {"lora_alpha": alpha}}}


def whole_llava(cfg: Any) -> Path | None:
    """`model.llama_model`, if it is no LLM alone but a whole LLaVA.

    WeightsError where its config.json says something else than the section.
    """
    if (found := _whole_config(cfg)) is None:
        return None
    file, content = found
    for there, key in _SAME_AS.items():
        if there in content and content[there] != getattr(cfg, key):
            raise WeightsError(f"model.{key}: {getattr(cfg, key)} must be {content[there]}, as {there} of {file} says")
    return file.parent


def _whole_config(cfg: Any) -> tuple[Path, dict[str, Any]] | None:
    """The config.json of the whole LLaVA that `model.llama_model` is, and its content; None for an LLM alone."""
    if not isinstance(cfg, LlavaConfig) or not cfg.llama_model:
        return None
    file = cfg.llm_directory(weights=()) / "config.json"
    with errors_as(WeightsError, f"model.llama_model: {file}"):
        content = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
        return (file, content) if isinstance(content, dict) and is_llava(content) else None


def warn_of_other_pixels(cfg: LlavaConfig) -> None:
    """A warning where a whole LLaVA was trained with another tower, or on images of another form: both load, and
    answer worse."""
    file, content = _whole_config(cfg) or (None, {})
    for there, key in _PIXELS.items():
        theirs, ours = content.get(there), getattr(cfg, key)
        if theirs and _last_name(theirs) != _last_name(ours):
            log.warning("model.%s: %s, but %s of %s is %s: answers may be worse", key, ours, there, file, theirs)


def _last_name(path: Any) -> str:
    """Of a path, or of a name on the hub."""
    return str(path).partition("@")[0].rstrip("/").rpartition("/")[2].lower()


def whole_file(cfg: Any) -> Path | None:
    """The file with the projection of the whole LLaVA that `model.llama_model` is; None if it is an LLM alone."""
    found = read_part(cfg, PROJECTOR)
    return found and found[0]


def read_part(cfg: Any, part: str) -> tuple[Path, dict[str, Tensor]] | None:
    """The tensors of a `part` of the whole LLaVA that `model.llama_model` is, and their file; None if it has none."""
    if whole_llava(cfg) is None:
        return None
    directory = cfg.llm_directory()
    require_shards(directory)
    tensors, file = {}, directory
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]):
        if found := _tensors(path, part):
            file = path
            tensors |= cut_names(found, part)
    return (file, tensors) if tensors else None


def whole_projection(cfg: Any) -> dict[str, Tensor]:
    """The projection of the whole LLaVA that `model.llama_model` is, by the names of checkpoints; empty for an LLM
    alone."""
    file, tensors = read_part(cfg, PROJECTOR) or (None, {})
    if file:
        log.info("The checkpoint has no projection; it is that of %s", file)
    return {f"llama_proj.{name}": tensor for name, tensor in tensors.items()}


def _tensors(path: Path, part: str) -> dict[str, Tensor]:
    """Those whose names hold `part`; of safetensors no others are read."""
    refuse_pointer(path, f"model.llama_model: {path}")
    with errors_as(WeightsError, f"model.llama_model: {path}"):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if part in name}  # noqa: SIM118
        return {name: tensor for name, tensor in read_state_dict(path, mapped=True).items() if part in name}
