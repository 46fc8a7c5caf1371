"""Loading an LLM in parts: what is refused, and that it says why as the loading of a whole one does.

One process is a group, too; tests/runners/test_sharded.py has two.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minigpt4.common.errors import ConfigError, WeightsError
from minigpt4.models import fsdp
from minigpt4.models.fsdp import decoder_layers, is_sharded, uneven_inputs
from minigpt4.models.llm import load_llm

CPU = torch.device("cpu")
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refusals(directory: Path) -> list[str]:
    """What loading it whole says, and loading it in parts."""
    texts = []
    for sharded in (False, True):
        with pytest.raises(WeightsError) as error:
            load_llm(directory, "fp32", CPU, sharded=sharded)
        texts.append(str(error.value))
    return texts


@pytest.mark.parametrize("name", ["vicuna_tiny", "vicuna_tiny_safetensors", "vicuna_tiny_sharded"])
def test_every_format_loads_in_parts(parity_dir, name):
    llm = load_llm(parity_dir / name, "fp32", CPU, sharded=True)
    whole = load_llm(parity_dir / name, "fp32", CPU)
    embeds = torch.randn(1, 5, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(llm(inputs_embeds=embeds).logits, whole(inputs_embeds=embeds).logits)
    assert is_sharded(llm)
    assert not is_sharded(whole)
    assert not any(parameter.requires_grad for parameter in llm.parameters())


def test_parts_are_stored_in_the_precision_asked_for(parity_dir):
    llm = load_llm(parity_dir / "vicuna_tiny", "bf16", CPU, sharded=True)
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}


EXTRA = {f"model.layers.1.adapter{index}.weight": torch.ones(1) for index in range(6)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: {n: t for n, t in tensors.items() if n != LAYER}, f"missing {LAYER} (1)"),
        (lambda tensors: tensors.update({LAYER: torch.zeros(3, 96)}), f"wrong shape {LAYER} (1)"),
        (lambda tensors: tensors.update(EXTRA), "not expected model.layers.1.adapter0.weight, "),
        (lambda tensors: {n: t * 1e-3 if "norm" in n else t for n, t in tensors.items()}, "is a delta, not a model"),
    ],
    ids=["missing", "shape", "left over", "delta"],
)
def test_tensors_that_do_not_fit_are_named(changed_llm, change, text):
    directory = changed_llm(change)
    assert all(str(directory) in said and text in said for said in refusals(directory))


def test_delta_is_known_by_its_name(llm_copy):
    for name in ("vicuna-13b-delta-v1.1", "Vicuna_Delta"):
        assert all("is a delta, not a model (its name says so)" in said for said in refusals(llm_copy(name=name)))


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("vicuna_tiny/pytorch_model.bin", 5000),
        ("vicuna_tiny_safetensors/model.safetensors", 5000),
        ("vicuna_tiny_sharded/pytorch_model-00002-of-00002.bin", None),
        ("vicuna_tiny_sharded/pytorch_model.bin.index.json", 1),
    ],
)
def test_missing_and_truncated_files_are_named(llm_copy, file, kept):
    source, name = file.split("/")
    path = llm_copy(source) / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    whole, parts = refusals(path.parent)
    assert name in parts
    assert str(path.parent) in whole


def test_architecture_without_named_layers_is_refused(parity_dir):
    llm = load_llm(parity_dir / "vicuna_tiny", "fp32", CPU)
    llm._no_split_modules = None
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not say which of its modules are layers; use ddp"):
        decoder_layers(llm)


def test_torch_that_cannot_leave_parameters_whole_is_refused(parity_dir, monkeypatch):
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, *, mesh=None: module)
    with pytest.raises(ConfigError, match="run.parallel: fsdp needs a newer torch than"):
        load_llm(parity_dir / "vicuna_tiny", "fp32", CPU, sharded=True)


def test_an_error_inside_is_raised_and_waits_for_nobody(parity_dir):
    llm = load_llm(parity_dir / "vicuna_tiny", "fp32", CPU, sharded=True)
    with pytest.raises(KeyError), uneven_inputs(llm):
        raise KeyError("a sample")
    assert not [hook for hook in llm.base_model._forward_pre_hooks.values() if "tell" in hook.__name__]
