"""`run.parallel: fsdp`: an LLM whose layers are spread over the processes of a run, by torch's FSDP2.

Each process holds a part of the rows of every matrix of the layers; a layer's parts are gathered before it computes and
let go afterwards. Vectors (norms, biases), embeddings and output layer are whole everywhere: the code reads them
directly, and they are small. So every pass is one of all processes together. Where some have more to do than others
(validation, answers of different lengths, evaluations), those that have finished make dummy passes until all have:
before each pass every process tells the others whether its own is a real one.

Where the LLM is trained, FSDP gives each process the gradients of its rows; those of what is whole everywhere DDP
averages, as those of the projection. `LocalRows` is what optimizer and checkpoints see of both.
"""

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from minigpt4.common.checkpoint import read_weights
from minigpt4.common.errors import ConfigError, RunError, WeightsError, errors_as
from minigpt4.common.model_schema import TrainRule
from minigpt4.common.schemas import RunConfig
from minigpt4.common.torch_files import WEIGHT_FILES
from minigpt4.models.base_model import freeze
from minigpt4.models.train_rules import apply_rule

log = logging.getLogger(__name__)

DID_NOT_COME = "run.parallel: fsdp: the other processes did not come to the LLM's next pass"


def mapped_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of an LLM directory, left on disk until they are read; WeightsError for missing or broken files."""
    for name in WEIGHT_FILES:
        index, paths = directory / f"{name}.index.json", [directory / name]
        if not paths[0].is_file():
            if not index.is_file():
                continue
            with errors_as(WeightsError, f"model.llama_model: {index}: cannot be read"):
                files = json.loads(index.read_bytes())["weight_map"].values()
                paths = [directory / file for file in sorted(set(files))]
        try:
            return {name: tensor for path in paths for name, tensor in read_weights(path, mapped=True).items()}
        except WeightsError as error:
            raise WeightsError(f"model.llama_model: {error}") from error
    raise WeightsError(f"model.llama_model: {directory} holds none of {', '.join(WEIGHT_FILES)}")


def sharding(run: RunConfig) -> dict[str, bool]:
    """What a model's `from_config` is told where `run.parallel: fsdp` finds several processes."""
    if run.parallel != "fsdp":
        return {}
    if not dist.is_initialized():
        log.warning("run.parallel: fsdp has one process only, which holds the whole LLM; start several by torchrun")
        return {}
    return {"shard_llm": True}


def is_sharded(llm: nn.Module) -> bool:
    """Whether the layers of an LLM are spread over processes."""
    return isinstance(llm.base_model, FSDPModule)


def load_sharded(
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    rule: TrainRule | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The LLM with this process's part of its layers on `device`, and what its files lack or have too much, as the
    `loading_info` of transformers' `from_pretrained`.

    Every process must call it; each reads the rows that stay with it, and none holds the whole LLM. WeightsError for
    files that are missing or broken, ConfigError for an architecture that does not name its layers, or an old torch.
    """
    weights = mapped_weights(directory)
    with init_empty_weights(include_buffers=False):  # buffers come from the architecture, not from files
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    freeze(llm)
    _shard(llm, DeviceMesh.from_group(dist.group.WORLD, device.type))
    buffers = {name: buffer.clone() for name, buffer in llm.named_buffers()}
    llm.to_empty(device=device)
    for name, buffer in llm.named_buffers():
        buffer.copy_(buffers[name])
    llm.tie_weights()
    llm.requires_grad_(False)
    report = _fill(llm, weights)
    if rule is not None and rule.trains_own:  # FSDP asks in the first pass what needs gradients
        apply_rule(llm, rule, "model.train.llm", decoder_layers(llm))
    dummy_forward(llm)  # makes the tensors that gathered layers lie in; made in inference mode they could never train
    return llm, report


@torch.no_grad()
def dummy_forward(llm: nn.Module) -> None:
    """The cheapest pass: one position, whose result nobody reads."""
    weight = llm.get_input_embeddings().weight
    llm.base_model(inputs_embeds=weight.new_zeros(1, 1, weight.shape[1]), use_cache=False)


def _shard(llm: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the layers' matrices; the base model is the root, for some callers pass by the output layer."""
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(f"run.parallel: fsdp needs a newer torch than {torch.__version__}, or use ddp")
    for layer in decoder_layers(llm):
        vectors = {parameter for parameter in layer.parameters() if parameter.ndim < 2}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=vectors)
    whole = {parameter for parameter in llm.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(llm.base_model, mesh=mesh, ignored_params=whole)


def decoder_layers(llm: nn.Module) -> list[nn.Module]:
    """The repeated blocks of an LLM, by the names that its architecture gives; ConfigError if it gives none."""
    names = set(llm._no_split_modules or ())
    layers = [part for part in llm.base_model.modules() if type(part).__name__.removeprefix("FSDP") in names]
    if not layers:
        text = f"{type(llm).__name__} does not say which of its modules are layers; use ddp"
        raise ConfigError(f"run.parallel: fsdp: {text}")
    return layers


@torch.no_grad()
def _fill(llm: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy this process's rows, all that is read of the files; returns what does not fit."""
    parameters = dict(llm.named_parameters())  # tied ones once, under their first name
    known = parameters.keys() | dict(llm.named_parameters(remove_duplicate=False)).keys()
    found = parameters.keys() & weights.keys()
    fitting = {name for name in found if weights[name].shape == parameters[name].shape}
    copy_weights(parameters, {name: weights[name] for name in sorted(fitting)})
    return {
        "missing_keys": parameters.keys() - found,
        "mismatched_keys": [(name, weights[name].shape, parameters[name].shape) for name in found - fitting],
        "unexpected_keys": weights.keys() - known - dict(llm.named_buffers()).keys(),
    }


def _rows(parameter: DTensor, whole: Tensor) -> Tensor:
    """This process's rows of a whole tensor; the last processes may have none."""
    mesh = parameter.device_mesh
    chunks = whole.chunk(mesh.size())
    return chunks[mesh.get_local_rank()] if len(chunks) > mesh.get_local_rank() else whole[:0]


@torch.no_grad()
def copy_weights(target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors that are known to fit into those of the same names, of sharded ones this process's rows."""
    for name, tensor in state.items():
        own = target[name]
        own.to_local().copy_(_rows(own, tensor)) if isinstance(own, DTensor) else own.copy_(tensor)


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; every process must call it for a sharded one."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True)


class LocalRows:
    """Trained weights as the optimizer sees them: of sharded ones this process's rows, plain and in the same memory."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
        rows = {name: nn.Parameter(p.detach().to_local()) for name, p in self._sharded.items()}
        self.parameters = {**parameters, **rows}
        self._of = {id(p): (rows[name], p) for name, p in self._sharded.items()}
        self._whole = {id(own): p for own, p in self._of.values()}

    def __bool__(self) -> bool:
        return bool(self._sharded)

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of an optimizer, with rows in the place of sharded weights."""
        rows = {key: own for key, (own, _) in self._of.items()}
        return [group | {"params": [rows.get(id(p), p) for p in group["params"]]} for group in groups]

    def take_gradients(self) -> None:
        """What a backward pass left to the sharded weights also is the rows' gradient."""
        for name, parameter in self._sharded.items():
            self.parameters[name].grad = None if parameter.grad is None else parameter.grad.to_local()

    def give_gradients(self) -> None:
        """The other way round: after a resume, or None after a step."""
        for name, parameter in self._sharded.items():
            own = self.parameters[name].grad
            parameter.grad = None if own is None else self._spread(own, parameter)

    def total_norm(self) -> Tensor:
        """Of all gradients; the same on all processes."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = nn.utils.get_total_norm([g for name, g in gradients.items() if name not in self._sharded])
        if self._sharded:
            square = nn.utils.get_total_norm([gradients[name] for name in self._sharded]).square()
            dist.all_reduce(square)
            norm = (norm.square() + square).sqrt()
        return norm

    def like(self, parameter: nn.Parameter) -> Tensor:
        """Shape and type of the whole weight, without numbers."""
        return torch.empty(self._whole.get(id(parameter), parameter).shape, dtype=parameter.dtype, device="meta")

    def convert_moments(
        self, optimizer: dict[str, Any], groups: list[dict[str, Any]], *, gather: bool
    ) -> dict[str, Any]:
        """An optimizer's `state_dict` with moments of whole weights for those of rows, or the other way round.

        `groups`: those of the optimizer. To gather, every process must call it.
        """
        state = dict(optimizer["state"])
        indices = [index for group in optimizer["param_groups"] for index in group["params"]]
        parameters = [p for group in groups for p in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            if id(parameter) in self._whole and index in state:
                weight, change = self._whole[id(parameter)], {}
                for key in ("exp_avg", "exp_avg_sq"):
                    own = state[index][key]
                    change[key] = whole(self._spread(own, weight)) if gather else _rows(weight, own).clone()
                state[index] = {**state[index], **change}
        return {**optimizer, "state": state}

    @staticmethod
    def _spread(rows: Tensor, like: DTensor) -> DTensor:
        sizes = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, **sizes)


@contextmanager
def uneven_inputs(llm: nn.Module) -> Iterator[None]:
    """Inside, processes may call a sharded LLM as often as each needs; all of them must enter, and leave together.

    Nothing else in there may wait for other processes. After an error nobody is waited for: the process is to end, and
    its launcher ends the others. RunError if the others do not come in the time that the process group waits.
    """
    if not is_sharded(llm):
        yield
        return
    device = llm.get_input_embeddings().weight.device

    def real_passes(own: int) -> Tensor:
        """How many processes make a real pass now; the host waits only if it reads the number."""
        count = torch.tensor(float(own), device=device)
        with errors_as(RunError, f"{DID_NOT_COME}; see their own logs"):
            dist.all_reduce(count)
        return count

    def before_pass(*_: Any) -> None:
        real_passes(1)

    handle = llm.base_model.register_forward_pre_hook(before_pass)
    try:
        yield
    finally:
        handle.remove()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        while real_passes(0).item():
            dummy_forward(llm)
