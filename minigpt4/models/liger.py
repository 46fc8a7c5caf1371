"""`model.llm_kernels: liger`: norms and MLPs of a LLaMA-like LLM by the fused Triton kernels of Liger-Kernel.

In transformers a norm or a gated MLP is a handful of small operations, each of which reads and writes all activations;
here each is one. The results are the same up to rounding. Liger's own patching swaps classes of transformers for the
whole process; this takes its functions and changes the modules of one LLM.
Shapes: B rows, T positions, D channels of the LLM.
"""

import importlib.util
from types import MethodType

import torch
from torch import Tensor, nn

from minigpt4.common.errors import ConfigError

LIGER_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types of transformers whose norms and MLPs compute what the kernels compute."""


def require_liger(device: torch.device) -> None:
    """ConfigError where the kernels cannot run."""
    if device.type != "cuda":
        raise ConfigError(
            f"model.llm_kernels: liger: its kernels run on CUDA GPUs, but the LLM goes to {device}; set it to null"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("model.llm_kernels: liger: needs the package liger-kernel: pip install -e '.[gpu]'")


def use_liger(llm: nn.Module) -> int:
    """Let norms and MLPs of an LLM compute by Liger's kernels; how many modules do.

    Raises ConfigError for an LLM that they do not fit.
    """
    kind, activation = llm.config.model_type, getattr(llm.config, "hidden_act", None)
    if kind not in LIGER_TYPES or activation != "silu":
        raise ConfigError(
            f"model.llm_kernels: liger: made for {', '.join(sorted(LIGER_TYPES))} with silu, but the LLM is {kind} "
            f"with {activation}; set it to null"
        )
    count = 0
    for module in llm.base_model.modules():
        forward = _norm if hasattr(module, "variance_epsilon") else _mlp if hasattr(module, "gate_proj") else None
        if forward is not None:
            module.forward = MethodType(forward, module)
            count += 1
    return count


def _norm(module: nn.Module, hidden_BTD: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # Not in place: whether anybody else reads the gradient that comes in is transformers' business.
    return liger_rms_norm(hidden_BTD, module.weight, module.variance_epsilon, in_place=False)


def _mlp(module: nn.Module, hidden_BTD: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return module.down_proj(liger_swiglu(module.gate_proj(hidden_BTD), module.up_proj(hidden_BTD)))
