"""Frozen, in one place: no gradient, eval mode that survives `.train()`, storage in the chosen precision."""

from types import MethodType

import torch
from torch import nn

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
