"""Frozen, in one place: no gradient, eval mode that survives `.train()`, storage in the chosen precision."""

from contextlib import AbstractContextManager, nullcontext
from types import MethodType

import torch
from torch import Tensor, nn

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MATMULS = (nn.Linear, nn.Conv2d)


def freeze(module: nn.Module) -> nn.Module:
    """Take `module` out of training for good and return it."""
    module.requires_grad_(False)
    module.eval()
    for part in module.modules():
        part.train = MethodType(_stay_in_eval, part)
    return module


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `nn.Module.train` on frozen modules."""
    return module


def store_matmuls(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Store weight and bias of linear and convolution layers in `dtype`; norms and embeddings stay fp32.

    Under autocast this gives the numbers of fp32 storage at half the memory, as the original's fp16 ViT.
    """
    for part in module.modules():
        if isinstance(part, _MATMULS):
            part.to(dtype)
    return module


def is_trained(*modules: nn.Module | None) -> bool:
    """Whether any parameter of the modules takes gradients."""
    return any(p.requires_grad for module in modules if module is not None for p in module.parameters())


def native_dtype(model: nn.Module) -> AbstractContextManager:
    """Inside, a 16-bit LLM computes in its own type; one in fp32 follows the caller's autocast.

    Autocast to the other 16-bit type (`run.amp_dtype`) would copy every weight and keep the copies for the backward
    pass: the LLM's memory once more.
    """
    weight = model.get_input_embeddings().weight
    if weight.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(weight.device.type, enabled=False)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on `device`; from page-locked memory to a GPU, for then the host need not wait."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
