"""Loading an LLM in parts: what is refused, and that it says why as the loading of a whole one does.

One process is a group, too; tests/runners/test_sharded.py has two.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from minigpt4.common.errors import ConfigError, WeightsError
from minigpt4.models import fsdp
from minigpt4.models.fsdp import decoder_layers, is_sharded, uneven_inputs
from minigpt4.models.llm import check_llm, load_llm
from minigpt4.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refusal(directory: Path) -> str:
    """What loading in parts says; a whole one is refused, too."""
    with pytest.raises(WeightsError):
        load_llm(directory, "fp32", CPU)
    with pytest.raises(WeightsError) as error:
        load_llm(directory, "fp32", CPU, sharded=True)
    return str(error.value)


@pytest.fixture
def changed_llm(llm_copy):
    """A copy of the LLM whose safetensors went through `change(tensors)`."""

    def build(change) -> Path:
        directory = llm_copy("vicuna_tiny_safetensors")
        tensors = load_file(directory / "model.safetensors")
        save_file(change(tensors) or tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return build


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


def test_missing_tensors_are_named(changed_llm):
    directory = changed_llm(lambda tensors: {n: t for n, t in tensors.items() if n != LAYER})
    assert f"missing {LAYER} (1)" in refusal(directory)


def test_tensors_of_another_shape_are_named(changed_llm):
    directory = changed_llm(lambda tensors: tensors.update({LAYER: torch.zeros(3, 96)}))
    assert f"wrong shape {LAYER} (1)" in refusal(directory)


def test_tensors_that_are_left_over_are_named(changed_llm):
    directory = changed_llm(lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(3)}))
    assert "not expected model.layers.9.mlp.up_proj.weight (1)" in refusal(directory)


def test_delta_is_refused_by_its_norms(changed_llm):
    directory = changed_llm(lambda tensors: {n: t * 1e-3 if "norm" in n else t for n, t in tensors.items()})
    assert "is a delta, not a model (the mean size of its norm weights" in refusal(directory)


def test_delta_is_refused_by_its_name(llm_copy):
    assert "is a delta, not a model (its name says so)" in refusal(llm_copy(name="vicuna-7b-delta-v0"))


def test_directory_without_weights_is_named(llm_copy):
    directory = llm_copy("vicuna_tiny_safetensors")
    (directory / "model.safetensors").unlink()
    assert f"{directory} holds none of model.safetensors, pytorch_model.bin" in refusal(directory)


def test_file_that_only_the_index_names_is_named(llm_copy):
    directory = llm_copy("vicuna_tiny_sharded")
    (index,) = directory.glob("*.index.json")
    file = sorted(set(json.loads(index.read_text())["weight_map"].values()))[0]
    (directory / file).unlink()
    assert f"{directory / file}: no such file" in refusal(directory)


@pytest.mark.parametrize("name", ["vicuna_tiny/pytorch_model.bin", "vicuna_tiny_safetensors/model.safetensors"])
def test_truncated_file_is_named(llm_copy, name):
    source, file = name.split("/")
    path = llm_copy(source) / file
    path.write_bytes(path.read_bytes()[:5000])
    assert f"model.llama_model: {path}: broken" in refusal(path.parent)


def test_index_that_cannot_be_read_is_named(llm_copy):
    directory = llm_copy("vicuna_tiny_sharded")
    (index,) = directory.glob("*.index.json")
    index.write_text("{")
    with pytest.raises(WeightsError, match=index.name):
        load_llm(directory, "fp32", CPU, sharded=True)


def test_sentence_refuses_weights_of_zero(changed_llm):
    directory = changed_llm(lambda tensors: {n: t if "norm" in n else t * 0 for n, t in tensors.items()})
    llm = load_llm(directory, "fp32", CPU, sharded=True)
    with pytest.raises(WeightsError, match="a uniform guess has"):
        check_llm(llm, load_tokenizer(directory), directory)


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
