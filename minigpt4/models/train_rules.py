"""`model.train`: what a rule leaves of a part to be trained. Adapters are peft's, put into the modules that are there,
so that a part keeps its class and its calls."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.model_schema import TrainRule
from minigpt4.models.base_model import freeze, train_within

ADAPTER = "default"
"""What peft calls the only one."""
OF_PEFT_MODEL = "base_model.model."
"""What published checkpoints with LoRA have before the names of the LLM: those of a `PeftModel`."""


def apply_rule(part: nn.Module, rule: TrainRule, key: str, blocks: Sequence[nn.Module] = ()) -> None:
    """Train of `part` what the rule says, and freeze the rest; `blocks` are its layers, `key` is where the rule stands.

    Raises ConfigError if the part has not so many blocks, or no layers that adapters could be put beside.
    """
    if rule.rule == "last" and rule.blocks > len(blocks):
        raise ConfigError(f"{key}.blocks: {rule.blocks}, but there are only {len(blocks)}")
    freeze(part)
    if rule.is_lora:
        add_lora(part, rule, key)
        train_within(part, [module for name, module in part.named_modules() if name.endswith(f".{ADAPTER}")])
    elif rule.rule == "head":
        train_within(part, [part.get_output_embeddings()])
    elif rule.trains_own:
        train_within(part, [part] if rule.rule == "full" else blocks[-rule.blocks :])


def add_lora(part: nn.Module, rule: TrainRule, key: str) -> None:
    """Put adapters in fp32 beside the linear layers that the rule names; B is 0, so they change nothing yet."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds
    except ImportError as error:
        raise ConfigError(f"{key}: {rule.rule} needs peft: pip install peft ({error})") from error
    with errors_as(ConfigError, f"{key}.target_modules"):
        inject_adapter_in_model(LoraConfig(**lora_arguments(part, rule)), part, ADAPTER)
    for name, parameter in part.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def lora_arguments(part: nn.Module, rule: TrainRule) -> dict[str, Any]:
    """Of peft's `LoraConfig`. Without `target_modules` all linear layers but the output layer, as in LLaVA."""
    head = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
    linear = [n for n, m in part.named_modules() if isinstance(m, nn.Linear) and m is not head]
    targets = rule.target_modules or linear
    return {"r": rule.r, "lora_alpha": rule.alpha, "lora_dropout": rule.dropout, "target_modules": targets}


def trained_weights_of(llm: nn.Module, rule: TrainRule) -> Mapping[str, nn.Parameter]:
    """The LLM's trained parameters under the names of checkpoints; no walk over a frozen one."""
    if rule.rule == "frozen":
        return MappingProxyType({})
    before = f"llama_model.{OF_PEFT_MODEL if rule.is_lora else ''}"
    return {f"{before}{name}": p for name, p in llm.named_parameters() if p.requires_grad}
