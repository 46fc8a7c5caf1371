"""Reading weights: safe (`weights_only`), strict (set equality of keys), with errors that name the file.

Formats: bare state dicts (`eva_vit_g.pth`), LAVIS files (`{"model": {...}}`), published MiniGPT-4 checkpoints
(`{"model", "optimizer", "scaler", "config", "epoch"}`), Lightning's (`{"state_dict": {...}}`) and safetensors.

A run's checkpoints are written so that a kill at any moment leaves whole files only: `NAME.pth` in the published layout
plus a `state` entry for exact resume, and its card `NAME.json`, written last, which says what the file is and holds its
sha256. A file without a fitting card was being written when the run died.
"""

import fnmatch
import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from minigpt4.common.errors import WeightsError, errors_as, first_line
from minigpt4.common.hub import WEIGHTS, hub_name, local_path
from minigpt4.common.torch_files import check_torch_file, file_sha256, refuse_pointer
from minigpt4.common.utils import is_url, read_facts, replacing, sync

log = logging.getLogger(__name__)

ITERATION_PATTERN = "checkpoint_iter_*.pth"
BEST = "checkpoint_best.pth"
NUMBERED = "checkpoint_[!b]*.pth"
"""All but the best."""
CARD_TYPES = {"run_number": int, "run_started": str, "iteration": int, "best_loss": int | float}
CARD_TYPES |= {"llm_fingerprint": str, "vision_fingerprints": dict, "lora_alpha": dict}
CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
"""Entries under which programs save the weights: this one and LAVIS, Lightning, plain PyTorch, DeepSpeed."""
WITHIN = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What FSDP and activation checkpointing put into names."""
WRAPPERS = ("module.", "model.", "_orig_mod.", "_forward_module.")
"""What DDP, a Lightning module, torch.compile and DeepSpeed put before the names of the model inside."""
DOWNLOAD_HINT = "python scripts/download_weights.py --list shows where each published file is"


def find_weights(value: str | None, key: str, published_name: str) -> Path:
    """Path of a weights file given by path, by its name on the hub (`hf:owner/name/file`), by its published URL, or not
    at all; WeightsError, with the key, if it is not there. A URL or an unset value is looked up by file name in
    `weights/` and torch's download cache, and a URL of the hub then there."""
    with errors_as(WeightsError, f"{key}: {value}"):
        if value and not is_url(value):
            return require_file(local_path(value, key), key)
        name = Path(urlparse(value).path).name if value else published_name
        places = [Path("weights") / name, Path(torch.hub.get_dir()) / "checkpoints" / name]
        for path in places:
            if path.is_file():
                return path
        if value and hub_name(value):
            return require_file(local_path(value, key), key)
    looked = " and ".join(map(str, places))
    raise WeightsError(f"{key}: {name} was not found (looked for {looked}); set {key} to it. {DOWNLOAD_HINT}")


def require_file(path: Path, key: str) -> Path:
    """The path of a file of weights; WeightsError, with the key, if it is not there, or a folder, whose files it
    names."""
    if path.is_dir():
        files = some(sorted(file.name for kind in (*WEIGHTS, "*.pth") for file in path.glob(kind))) or "none of weights"
        raise WeightsError(f"{key}: {path} is a folder; name a file in it: {files}")
    if not path.is_file():
        raise WeightsError(f"{key}: there is no file {path}. {DOWNLOAD_HINT}")
    return path


def read_weights(path: str | Path, *, mapped: bool = False) -> dict[str, Any]:
    """Content of a `.pth`, `.bin` or `.safetensors` file, tensors on the CPU; WeightsError if it is missing, damaged,
    more than plain data, or larger in memory than on disk. `mapped`: processes share a pickle's tensors, too."""
    path = Path(path)
    try:
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        refuse_pointer(path, str(path))
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        is_zip = check_torch_file(path, sums=not mapped)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except WeightsError:
        raise
    except Exception as error:
        cause = first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # torch's own text is about switching its safety off
            cause = "torch.save did not write it"
        raise WeightsError(f"{path}: broken or truncated, or not a weights file: {cause}. Get it again.") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return dict(content)


def read_state_dict(path: str | Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file, see `read_weights` and `state_dict_of`."""
    return state_dict_of(read_weights(path, mapped=mapped), path)


def state_dict_of(content: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """The weights in the content of a file: its `model` entry (or what others call it), else the file itself, without
    the prefix of a wrapper such as DDP. WeightsError, naming `source`, where there are none, or odd tensors."""
    state: Any = content
    for _ in CONTAINERS:  # one in another at most so often, for a pickle may hold itself
        name = next((name for name in CONTAINERS if name in state and not isinstance(state[name], Tensor)), None)
        if name is None:
            break
        state = state[name]
        if not isinstance(state, Mapping):
            raise WeightsError(f"{source}: its entry '{name}' is a {type(state).__name__}, not a dictionary")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        found = some([f"{key} ({type(value).__name__})" for key, value in state.items()]) or "nothing"
        raise WeightsError(f"{source}: holds no tensors, but {found}. Save the weights alone, or as its entry 'model'")
    for name, tensor in tensors.items():
        require_plain(name, tensor, source)
    tensors = {WITHIN.sub("", name): tensor for name, tensor in tensors.items()}
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in tensors)), ""):
        log.info("%s: all names begin with '%s', which a wrapper put there; it is taken off", source, prefix)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def require_plain(name: Any, tensor: Tensor, source: str | Path) -> None:
    """WeightsError for what copying would make larger, or could not be copied."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not is_plain or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
        kind = f"{type(tensor).__name__}, {tensor.layout}, {tensor.dtype}, on {tensor.device}"
        raise WeightsError(f"{source}: {name} is no plain tensor in memory ({kind}); save it as one")
    if not isinstance(name, str):
        raise WeightsError(f"{source}: a tensor is called {name!r}, which is no name of a weight")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise WeightsError(f"{source}: {name} is an expanded view of fewer numbers; save it .contiguous()")


@torch.no_grad()
def copy_strict(
    target: Mapping[str, Tensor], state: Mapping[str, Tensor], *, source: str | Path, hint: str = ""
) -> None:
    """Copy `state` into `target` in place, if `require_fit` lets it; dtypes are converted to the target's."""
    require_fit(target, state, source=source, hint=hint)
    for name, tensor in state.items():
        target[name].copy_(tensor)


def require_fit(
    target: Mapping[str, Tensor], state: Mapping[str, Tensor], *, source: str | Path, hint: str = ""
) -> None:
    """WeightsError with all that differs, unless keys and shapes are equal and all numbers finite."""
    problems: dict[str, list[str]] = {
        "missing": sorted(target.keys() - state.keys()),
        "not expected": sorted(state.keys() - target.keys()),
        "wrong shape": [],
        "wrong type": [],
    }
    common = {name: (state[name], target[name]) for name in target if name in state}
    for name, (theirs, ours) in common.items():
        if theirs.shape != ours.shape:
            shapes = f"{name} is {tuple(theirs.shape)} in the file, {tuple(ours.shape)} in the model"
            problems["wrong shape"].append(shapes)
        if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex():
            problems["wrong type"].append(f"{name} is {theirs.dtype} in the file, {ours.dtype} in the model")
    if any(problems.values()):
        lines = [f"{title}: {some(names)}" for title, names in problems.items() if names]
        if any(ours.numel() and not theirs.numel() for theirs, ours in common.values()):
            lines.append("Its tensors are empty, as DeepSpeed's ZeRO-3 leaves them; zero_to_fp32.py writes whole ones.")
        raise WeightsError("\n  ".join([f"{source} does not fit the model.", *lines, *filter(None, [hint])]))
    broken = [name for name, (theirs, ours) in common.items() if not is_finite(theirs.to(ours.dtype))]
    if broken:
        odd = f"NaN, infinity or numbers beyond the model's type in {some(broken)}"
        raise WeightsError(f"{source}: holds {odd}; take an earlier checkpoint, or get it again")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; one pass without a copy."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def drop_keys(state: Mapping[str, Tensor], patterns: Iterable[str]) -> dict[str, Tensor]:
    """`state` without the keys that match one of the shell patterns (the named allow-list)."""
    dropped = {name for pattern in patterns for name in state if fnmatch.fnmatchcase(name, pattern)}
    return {name: tensor for name, tensor in state.items() if name not in dropped}


def some(names: list[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# Checkpoints of a run


def card_path(checkpoint: Path) -> Path:
    """The JSON card beside a checkpoint."""
    return checkpoint.with_suffix(".json")


def save_checkpoint(path: Path, content: Mapping[str, Any], card: Mapping[str, Any]) -> None:
    """Write file and card beside their places, then rename them, the card last; WeightsError if the disk refuses.

    What was there before, even under this name, stays whole.
    """
    try:
        with replacing(card_path(path)) as new_card, replacing(path) as new:  # left in reverse order
            with new.open("wb") as file:
                torch.save(dict(content), file)
            facts = {"file": path.name, "bytes": new.stat().st_size, "sha256": file_sha256(new)}
            new_card.write_text(json.dumps({**card, **facts}, indent=2), encoding="utf-8")
            sync(new)
            sync(new_card)
            card_path(path).unlink(missing_ok=True)  # an older card must not stand beside the new file
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        cause: BaseException = error  # the system's own, which torch hides behind "unexpected pos 640 vs 534"
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        way_out = "Earlier checkpoints are whole: free some space and go on with run.resume_ckpt_path=auto"
        raise WeightsError(f"{path}: could not be saved: {cause}. {way_out}") from error


def drop_leftovers(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it saved."""
    for path in folder.glob(".checkpoint_*"):
        log.info("%s was left by a save that did not end; it is deleted", path)
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a file that nobody needs, if it is there; a disk that refuses costs a warning."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be deleted (%s)", path, error.strerror)


def amend_card(path: Path, **facts: Any) -> None:
    """Add what became known later to the card of a checkpoint; WeightsError if the disk refuses."""
    if card := read_card(path):
        with errors_as(WeightsError, f"{card_path(path)}: could not be written"), replacing(card_path(path)) as new:
            new.write_text(json.dumps(card | facts, indent=2), encoding="utf-8")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint; WeightsError if it is broken or is not what its card says."""
    card = read_card(path)
    with errors_as(WeightsError, f"{path}: cannot be read"):
        if card is not None and path.is_file() and card["sha256"] != file_sha256(path):
            card_name = card_path(path).name
            raise WeightsError(f"{path}: its content is not what {card_name} says; take an earlier checkpoint")
        content = read_weights(path)
        for name, tensor in _tensors(content):  # an optimizer would write beyond the end of an expanded one
            require_plain(name, tensor, path)
    return content


def _tensors(tree: Any, name: str = "the file") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(value, str(key))


def read_card(path: Path) -> dict[str, Any] | None:
    """The card of a checkpoint, or None if it has none that can be read."""
    card = read_facts(card_path(path))
    fits = all(isinstance(card.get(key), kind | None) for key, kind in CARD_TYPES.items())
    return card if fits and isinstance(card.get("sha256"), str) else None


def newest_checkpoint(output_dir: Path, job_name: str, folder: str = "*") -> Path | None:
    """The checkpoint of this job in `output_dir/*/` that is furthest on in its latest run, whole by its card.

    Runs are ordered by their numbers, for clocks are set back, and without by their starts. What is broken or half
    written is passed over, with a warning.
    """
    return _furthest(output_dir.glob(f"{folder}/{NUMBERED}"), job_name)


def best_checkpoint(folder: Path) -> Path | None:
    """`checkpoint_best.pth` of a run's folder, else the checkpoint that is furthest on; whole by its card."""
    return _furthest(folder.glob(BEST)) or _furthest(folder.glob(NUMBERED))


def _furthest(paths: Iterable[Path], job_name: str | None = None) -> Path | None:
    found = []
    for path in paths:
        card = read_card(path)
        if card is None:
            log.warning("%s has no card that can be read: half written or not of a run; it is passed over", path)
        elif job_name in (None, card.get("job_name")):
            run = (card.get("run_number") or 0, card.get("run_started") or "")
            found.append((run, card.get("iteration") or 0, path, card["sha256"]))
    for _, _, path, sha256 in sorted(found, reverse=True):
        try:
            if sha256 == file_sha256(path):
                return path
            log.warning("%s is damaged and is passed over", path)
        except OSError as error:
            log.warning("%s cannot be read (%s) and is passed over", path, error.strerror)
    return None


def drop_old(folder: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints of `save_every_iters` (None: none), cards first."""
    cards = ((read_card(path), path) for path in folder.glob(ITERATION_PATTERN))
    whole = sorted((card.get("iteration") or 0, path) for card, path in cards if card is not None)
    for _, path in whole[:-keep] if keep else ():
        _delete(card_path(path))
        _delete(path)
