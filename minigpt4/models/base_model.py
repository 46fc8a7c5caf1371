"""What every model here has: a configuration, a device, parts that are trained or frozen, groups for the optimizer."""

from collections.abc import Collection
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
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return next(self.parameters()).device

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, under the names of checkpoints; the one place that decides it."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def stored_parameters(self) -> dict[str, nn.Parameter]:
        """What checkpoints hold: what is trained, and what no other file holds."""
        return self.trainable_parameters()

    def rule_of(self, name: str) -> Any:
        """With `lr` and `weight_decay` of the part that a trained weight belongs to, None: as the run says; or None."""
        return None

    def made_with(self) -> dict[str, Any]:
        """What a checkpoint's card says of the frozen parts that its weights belong to."""
        return {}

    def get_optimizer_params(self, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW groups: no decay for 1-D parameters and names with `bias`, `ln` or `bn`, as published.

        Parts with a rate or a decay of their own have two more groups, with the rate as `init_lr`.
        """
        groups: dict[tuple[Any, Any], tuple[list, list]] = {(None, None): ([], [])}
        for name, parameter in self.trainable_parameters().items():
            rule = self.rule_of(name)
            decay, plain = groups.setdefault((rule and rule.lr, rule and rule.weight_decay), ([], []))
            exempt = parameter.ndim < 2 or any(part in name for part in ("bias", "ln", "bn"))
            (plain if exempt else decay).append(parameter)
        return [
            {"params": params, "weight_decay": own_decay} | ({} if lr is None else {"init_lr": lr})
            for (lr, own), (decay, plain) in groups.items()
            for params, own_decay in ((decay, weight_decay if own is None else own), (plain, 0))
        ]


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


def train_within(module: nn.Module, trained: Collection[nn.Module]) -> None:
    """Take only these parts of a frozen module into training again: gradients, and train mode where it is asked for."""
    inside = {id(part) for own in trained for part in own.modules()}
    for own in trained:
        own.requires_grad_(True)
    for part in module.modules():
        if any(id(below) in inside for below in part.modules()):
            vars(part).pop("train", None)


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
