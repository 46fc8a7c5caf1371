"""Where a run lives, what its checkpoints hold, and how it goes on from one, exactly."""

import logging
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minigpt4.common.binding import AUTO
from minigpt4.common.checkpoint import is_finite, newest_checkpoint, read_checkpoint
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes, rng_state, set_rng_state
from minigpt4.common.errors import ConfigError, RunError, WeightsError
from minigpt4.common.optims import NOT_FINITE
from minigpt4.common.run_folder import RunFolder, hold_folder
from minigpt4.common.utils import JsonLines, is_before
from minigpt4.datasets.datasets.dataloader_utils import BAD_SAMPLES
from minigpt4.models.fsdp import copy_weights, whole
from minigpt4.models.loading import trained_weights

if TYPE_CHECKING:
    from minigpt4.runners.runner_base import RunnerBase

log = logging.getLogger(__name__)

GROUP_KEYS = ("params", "lr", "betas", "eps", "weight_decay")
"""Of a group of AdamW's parameters, in all versions."""
OWN_KEYS = ("fused", "foreach", "init_lr")
"""Those that a run takes from its configuration, not from a file."""
IN_USE = (
    "Two runs in one folder would mix their files: wait for it to end or stop it. To branch off beside it, name a "
    "checkpoint by run.resume_ckpt_path, which starts a folder of its own"
)


@dataclass
class Position:
    """Where a run stands."""

    epoch: int = 0
    iteration: int = 0
    """Iterations done in this epoch."""

    best: float | None = None
    """Lowest validation loss so far, nats a token."""


def choose_folder(config: Config, processes: Processes) -> tuple[Config, RunFolder]:
    """The run's folder, the same on all ranks, and the config with `auto` replaced by what was found, in whose folder
    training goes on; everything else gets a new folder. MiniGPT4Error on all ranks where there is none to be had."""
    checkpoint, folder = processes.on_main(lambda: _choose(config))
    return config.replace(run=replace(config.run, resume_ckpt_path=checkpoint)), RunFolder.existing(folder)


def _choose(config: Config) -> tuple[str | None, Path]:
    """Checkpoint and folder; the folder is this process's from here on."""
    run, output = config.run, Path(config.run.output_dir)
    checkpoint = run.resume_ckpt_path
    if checkpoint == AUTO:
        newest = newest_checkpoint(output, run.job_name)
        if newest is not None and not run.evaluate:
            folder = newest.parent
            hold_folder(folder, IN_USE)
            # Who was in there until now may have gone on meanwhile.
            return str(newest_checkpoint(folder.parent, run.job_name, folder.name) or newest), folder
        if newest is None and run.evaluate:
            none = f"no checkpoint of job {run.job_name} in {output}"
            raise ConfigError(f"run.resume_ckpt_path: auto: {none}; null evaluates model.ckpt")
        if newest is None:
            log.info("No checkpoint of job %s in %s yet: starting from scratch", run.job_name, output)
        checkpoint = newest and str(newest)
    folder = RunFolder.create(output).path
    hold_folder(folder, IN_USE)
    return checkpoint, folder


def content(runner: "RunnerBase", ranks: list[Any]) -> dict[str, Any]:
    """A checkpoint in the published layout, with a `state` entry beside it for exact resume.

    Every rank must call it where a sharded LLM is trained; rank 0's counts.
    """
    model, position, saved = runner.model, runner.position, _optimizer_state(runner)
    moments = runner.rows.convert_moments(saved["optimizer"], runner.optimizer.param_groups, gather=True)
    return {
        "model": {name: whole(p) for name, p in model.stored_parameters().items()},
        **saved,
        "optimizer": moments,
        "config": dict(runner.cfg.merged),
        "epoch": position.epoch - 1,  # the last whole one, as published
        "state": {"position": asdict(position), "ranks": ranks, "made_with": model.made_with()},
    }


def card(runner: "RunnerBase") -> dict[str, Any]:
    """What anyone may want to know of a 12 MB file without opening it."""
    config, facts = runner.cfg.merged, runner.run_log.folder.facts()
    section = config["model"]
    return {
        "arch": section.get("arch"),
        "model_type": section.get("model_type"),
        "llm": section.get("llama_model"),
        "vision": section.get("vit_model", "eva_clip_g"),
        **runner.model.made_with(),
        "trained": {name: list(p.shape) for name, p in runner.model.trainable_parameters().items()},
        "epoch": runner.position.epoch - 1,
        "iteration": runner.iterations_done,
        "best_loss": runner.position.best,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "config": dict(config),
        "job_name": runner.run.job_name,
        "run_number": facts.get("number", 0),
        "run_started": facts.get("started", ""),
    }


def _optimizer_state(runner: "RunnerBase") -> dict[str, Any]:
    """Optimizer and scaler in the published layout."""
    scaler = runner.scaler.state_dict() if runner.scaler.is_enabled() else None
    return {"optimizer": runner.optimizer.state_dict(), "scaler": scaler}


def rank_state(runner: "RunnerBase") -> dict[str, Any]:
    """What each rank saves of itself; "pending" is its gradients between two updates, None if there are none."""
    pending = None
    if runner.num_tokens > 0:
        gradients = {name: p.grad.cpu() for name, p in runner.parameters.items() if p.grad is not None}
        ids = [str(image_id) for image_id in runner.image_ids]
        pending = {"gradients": gradients, "tokens": runner.num_tokens, "ids": ids}
    return {
        "rng": rng_state(),
        "data": runner.loader.state_dict(),
        "pending": pending,
        "finite": runner.guard.state_dict(),
        "log": runner.run_log.state_dict(),
    }


def resume(path: Path, runner: "RunnerBase") -> list[dict[str, Any]]:
    """Put a runner where the checkpoint was saved; returns what its ranks saved, nothing for a file without that.

    A file of the original code has no `state`: the run then goes on at its next epoch, as it did there. WeightsError,
    naming the entry and before anything changes, for a file that does not fit or is not built like what a run saves.
    """
    saved, weights = _read(path, runner.model, replace(runner.model.cfg, ckpt_allow_keys=[]))
    own, groups = _optimizer_state(runner), runner.optimizer.param_groups
    like = [[runner.rows.like(p) for p in group["params"]] for group in groups]
    _check_optimizer(path, saved["optimizer"], own["optimizer"], like)
    scaler = saved.get("scaler") if runner.scaler.is_enabled() else None
    if scaler:
        require_like(scaler, own["scaler"], path, "scaler")
        if not scaler["scale"] > 0:
            raise WeightsError(f"{path}: scaler.scale is {scaler['scale']}; gradients cannot be scaled by it")
    position, ranks = _position(path, saved)
    trained = {n: p if runner.rows.like(p).shape == p.shape else None for n, p in runner.parameters.items()}
    own_rank = rank_state(runner)
    for number, entry in enumerate(ranks):
        _check_rank(path, entry, own_rank, trained, f"state.ranks[{number}]")

    # The file fits: from here on the runner changes.
    for group, our in zip(saved["optimizer"]["param_groups"], groups, strict=True):
        group |= {key: our[key] for key in OWN_KEYS if key in our}  # this run's choice
    runner.optimizer.load_state_dict(runner.rows.convert_moments(saved["optimizer"], groups, gather=False))
    if scaler:
        runner.scaler.load_state_dict(scaler)
    runner.position = position
    world_size = runner.processes.world_size
    if not ranks:
        log.warning("%s holds no random state and no data position: the run goes on at the next epoch", path)
    elif len(ranks) != world_size:
        runner.loader.load_state_dict(ranks[0]["data"])  # which finds out itself that it is of other ranks
        text = "%s was saved by %d processes, this run has %d: it goes on with the same weights and optimizer, but in "
        lost = "another order of samples, and gradients that waited for an update are lost"
        log.warning(text + lost, path, len(ranks), world_size)
    else:
        own_state = ranks[runner.processes.rank]
        runner.loader.load_state_dict(own_state["data"])
        if pending := own_state["pending"]:
            for name, gradient in pending["gradients"].items():
                runner.parameters[name].grad = gradient.to(runner.device)
            runner.rows.give_gradients()
            runner.num_tokens, runner.image_ids = pending["tokens"], list(pending["ids"])
        runner.guard.load_state_dict(own_state["finite"])
        runner.run_log.load_state_dict(own_state["log"])
        set_rng_state(own_state["rng"])
    copy_weights(runner.model.stored_parameters(), weights)
    return ranks


def load_weights(path: Path, model: nn.Module) -> Position:
    """Load a checkpoint's weights alone into `model`; where the run stood. WeightsError if it does not fit."""
    saved, weights = _read(path, model, model.cfg)
    position, _ = _position(path, saved)
    copy_weights(model.stored_parameters(), weights)
    return position


def _read(path: Path, model: nn.Module, cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of a checkpoint, and its weights, which fit the model; `cfg`: the section of the model."""
    saved = read_checkpoint(path)
    if missing := [key for key in ("model", "optimizer", "epoch") if key not in saved]:
        way_out = "a new run starts from its weights by model.ckpt instead of run.resume_ckpt_path"
        raise WeightsError(f"{path}: has no {', '.join(missing)}, so a run cannot go on from it; {way_out}")
    weights = trained_weights(model.stored_parameters(), path, cfg, model.made_with(), saved)
    require_like(saved["epoch"], 0, path, "epoch")
    return saved, weights


def require_adapters_trained(parameters: Mapping[str, nn.Parameter]) -> None:
    """RunError for adapters without gradient, which a layer that reads its own weights passes by (timm's Eva: qkv)."""
    if lost := [name for name, p in parameters.items() if p.grad is None and ".lora_" in name]:
        way_out = "name other layers in target_modules of model.train"
        raise RunError(f"{lost[0]}: no gradient reaches this adapter past the layer around it; {way_out}")


def drop_later_lines(folder: Path, ranks: list[dict[str, Any]], validated: int) -> None:
    """Drop what all ranks noted of bad samples and skipped updates after the checkpoint; rank 0 alone does it.

    `ranks`: what `resume` returned; `validated`: epochs whose validation is not done again.
    """
    if ranks:
        ends = {"batch": ranks[0]["data"].get("iteration", 0), "epoch": validated}
        JsonLines(folder / BAD_SAMPLES).keep(lambda line: all(is_before(line, *end) for end in ends.items()))
        updates = ranks[0]["finite"]["updates"]
        JsonLines(folder / NOT_FINITE).keep(lambda line: is_before(line, "update", updates + 1))


# Is a file built like what a run saves?


def _check_optimizer(path: Path, saved: Any, own: Mapping[str, Any], weights: list[list[Tensor]]) -> None:
    require_like(saved, {"state": {}, "param_groups": [{}]}, path, "optimizer")
    theirs, ours = saved["param_groups"], own["param_groups"]
    if len(theirs) != len(ours):
        raise WeightsError(f"{path}: optimizer has {len(theirs)} groups of parameters, this run has {len(ours)}")
    for number, (group, our) in enumerate(zip(theirs, ours, strict=True)):
        # Other versions of torch save other switches, and which implementation computes is this run's choice.
        known = [key for key in our if key in GROUP_KEYS or (key in group and key not in OWN_KEYS)]
        like = {key: float(our[key]) if type(our[key]) is int else our[key] for key in known}
        require_like(group, like, path, f"optimizer.param_groups[{number}]")
        for index, like in zip(group["params"], weights[number], strict=True):
            moments, where = saved["state"].get(index), f"optimizer.state.{index}"
            if moments is None:  # never updated
                continue
            step = torch.zeros(()) if isinstance(_mapping(saved["state"], index).get("step"), Tensor) else 0.0
            require_like(moments, {"exp_avg": like, "exp_avg_sq": like, "step": step}, path, where)
            if not (is_finite(moments["exp_avg"]) and is_finite(moments["exp_avg_sq"])):
                raise WeightsError(f"{path}: {where} holds NaN or infinity; take an earlier checkpoint")


def _position(path: Path, saved: Mapping[str, Any]) -> tuple[Position, list[dict[str, Any]]]:
    """Where the run stood, and what its ranks saved: nothing in a file of the original code."""
    state = saved.get("state")
    if state is None:
        return Position(saved["epoch"] + 1), []
    require_like(state, {"position": {"epoch": 0, "iteration": 0, "best": None}, "ranks": [{}]}, path, "state")
    at, ranks = state["position"], state["ranks"]
    position = Position(at["epoch"], at["iteration"], at["best"])
    if position.best is not None:
        require_like(position.best, 0.0, path, "state.position.best")
    if min(position.epoch, position.iteration) < 0 or not ranks:
        raise WeightsError(f"{path}: state: is at {position}, saved by {len(ranks)} processes; that cannot be")
    return position, ranks


def _check_rank(path: Path, entry: dict[str, Any], own: dict[str, Any], trained: Mapping[str, Any], where: str) -> None:
    data, pending = _mapping(entry, "data"), _mapping(entry, "pending")
    # A source that the file does not know is read from its start.
    sources = {name: ours for name, ours in own["data"].get("sources", {}).items() if name in _mapping(data, "sources")}
    of_file = {"sources": sources, "counts": dict.fromkeys(_mapping(data, "counts"), [0, 0])}
    gradients = {name: trained.get(name, "") for name in _mapping(pending, "gradients")}
    rng = {key: own["rng"][key] for key in ("numpy", "torch")} | {"python": [*own["rng"]["python"][:2], None]}
    like = {
        **own,
        "rng": rng,
        "data": own["data"] | {key: of_file[key] for key in of_file if key in own["data"]},
        "pending": None if entry.get("pending") is None else {"gradients": gradients, "tokens": 0, "ids": []},
        "log": None if entry.get("log") is None else dict.fromkeys(("lr", "loss"), [0.0, 0.0]),
    }
    require_like(entry, like, path, where)
    for name, ours in sources.items():
        theirs = data["sources"][name]
        if theirs["order"] == ours["order"] and len(theirs["cursors"]) != len(ours["cursors"]):
            raise WeightsError(f"{path}: {where}.data.sources.{name} has cursors of another number of workers")


def _mapping(owner: Any, key: str) -> Mapping[Any, Any]:
    """Entry of a dictionary that is one itself, else an empty one."""
    value = owner.get(key) if isinstance(owner, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def require_like(value: Any, own: Any, path: Path, where: str) -> None:
    """WeightsError, naming file and entry, unless `value` has the types of `own`, finite numbers, all keys of its
    dictionaries, as many numbers in its lists, tensors of the same shape and dtype; None in `own` is anything."""
    if own is None:
        return
    kind = next((kind for kind in (bool, int, float, str, Mapping, list, Tensor) if isinstance(own, kind)), tuple)
    fits = {float: (int, float), list: (list, tuple), tuple: (list, tuple)}.get(kind, kind)
    if not isinstance(value, fits) or (isinstance(value, bool) and kind is not bool):
        raise WeightsError(f"{path}: {where} is a {type(value).__name__}, a run saves a {kind.__name__} there")
    if kind is float and not math.isfinite(value):
        raise WeightsError(f"{path}: {where} is {value}")
    if isinstance(own, Mapping):
        if lost := [str(key) for key in own if key not in value]:
            raise WeightsError(f"{path}: {where} lacks {', '.join(lost)}")
        for key in own:
            require_like(value[key], own[key], path, f"{where}.{key}")
    elif isinstance(own, list | tuple) and own:
        if isinstance(own[0], int | float) and len(value) != len(own):
            raise WeightsError(f"{path}: {where} has {len(value)} entries, {len(own)} here")
        for number, entry in enumerate(value):
            require_like(entry, own[min(number, len(own) - 1)], path, f"{where}[{number}]")
    elif isinstance(own, Tensor) and (value.dtype, value.shape) != (own.dtype, own.shape):
        theirs, ours = (f"{tuple(one.shape)} of {one.dtype}" for one in (value, own))
        raise WeightsError(f"{path}: {where} is a tensor {theirs}, a run saves {ours} there")
