"""Frozen modules take no gradient, stay in eval mode, and are stored in the precision asked for."""

import pytest
import torch
from torch import nn

from minigpt4.models.base_model import freeze, store_matmuls


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.5)), nn.Linear(4, 4))


def test_freeze_gives_the_module_back_without_gradients():
    module = network()
    assert freeze(module) is module
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("switch", ["whole", "part", "parent"])
def test_frozen_modules_stay_in_eval_mode(switch):
    module = freeze(network())
    parent = nn.Sequential(module, nn.Dropout(0.5))
    {"whole": module, "part": module[1], "parent": parent}[switch].train()
    assert not any(part.training for part in module.modules())
    assert parent[1].training


def test_matmuls_alone_change_their_storage():
    module = store_matmuls(network(), torch.bfloat16)
    dtypes = {type(part).__name__: part.weight.dtype for part in module.modules() if hasattr(part, "weight")}
    assert dtypes == {"Conv2d": torch.bfloat16, "LayerNorm": torch.float32, "Linear": torch.bfloat16}
    assert module[0].bias.dtype == torch.bfloat16
