"""What every model here has: a configuration, a device, parts that are trained or frozen, groups for the optimizer."""

from types import MethodType
from typing import Any, ClassVar

import torch
from torch import nn

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MATMULS = (nn.Linear, nn.Conv2d)


class BaseModel(nn.Module):
    """A model of the registry: `from_config` builds it from its section `model:` and loads its weights."""

    config_class: ClassVar[type]
    """Dataclass of the section `model:`."""

    @classmethod
    def from_config(cls, cfg: Any, device: torch.device | str = "cpu", **arguments: Any) -> "BaseModel":
        """The model of a section, with its weights, on `device`."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return next(self.parameters()).device

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, under the names of checkpoints; the one place that decides it."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def made_with(self) -> dict[str, Any]:
        """What a checkpoint's card says of the frozen parts that its weights belong to."""
        return {}

    def get_optimizer_params(self, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW groups: no decay for 1-D parameters and names with `bias`, `ln` or `bn`, as published."""
        decay, plain = [], []
        for name, parameter in self.trainable_parameters().items():
            exempt = parameter.ndim < 2 or any(part in name for part in ("bias", "ln", "bn"))
            (plain if exempt else decay).append(parameter)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0}]


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `nn.Module.train` on frozen modules, which stay in eval mode."""
    return self


def freeze(module: nn.Module) -> nn.Module:
    """Take `module` out of training for good: no gradient, eval mode that survives `.train()`; returns it."""
    module.requires_grad_(False)
    module.eval()
    for part in module.modules():
        part.train = MethodType(disabled_train, part)
    return module


def is_trained(*modules: nn.Module) -> bool:
    """Whether any parameter of the modules requires a gradient."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def store_matmuls(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Store weight and bias of linear and convolution layers in `dtype`; norms and embeddings stay fp32.

    Under autocast this gives the numbers of fp32 storage at half the memory, as the original's fp16 ViT.
    """
    for part in module.modules():
        if isinstance(part, _MATMULS):
            part.to(dtype)
    return module
