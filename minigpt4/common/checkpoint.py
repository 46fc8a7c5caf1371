"""Reading weights: safe (`weights_only`), strict (set equality of keys), with errors that name the file.

Formats: bare state dicts (`eva_vit_g.pth`), LAVIS files (`{"model": {...}}`), published MiniGPT-4 checkpoints
(`{"model", "optimizer", "scaler", "config", "epoch"}`) and safetensors.
"""

import fnmatch
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from minigpt4.common.errors import WeightsError

MAX_NAMED = 8
DOWNLOAD_HINT = "python scripts/download_weights.py --list shows where each published file is"


def find_weights(value: str | None, key: str, published_name: str) -> Path:
    """Path of a weights file given by path, by its published URL, or not at all.

    A URL or an unset value is looked up by file name in `weights/` and in torch's download cache, where the
    original code kept its files. Raises WeightsError, naming the YAML key, if nothing is there.
    """
    if value and not urlparse(str(value)).scheme.startswith("http"):
        path = Path(value).expanduser()
        if path.is_file():
            return path
        raise WeightsError(f"{key}: there is no file {path}. {DOWNLOAD_HINT}")
    name = Path(urlparse(value).path).name if value else published_name
    places = [Path("weights") / name, Path(torch.hub.get_dir()) / "checkpoints" / name]
    for path in places:
        if path.is_file():
            return path
    looked = " and ".join(map(str, places))
    raise WeightsError(f"{key}: {name} was not found (looked for {looked}); set {key} to it. {DOWNLOAD_HINT}")


def read_weights(path: str | Path, *, mapped: bool = False) -> dict[str, Any]:
    """Content of a `.pth`, `.bin` or `.safetensors` file, tensors on the CPU.

    `mapped`: leave the tensors of a pickle on disk until they are read, then in memory that processes share, as those
    of safetensors always are. Files of torch before 1.6 are read whole all the same.

    Raises WeightsError for a missing or truncated file and for a pickle that holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(_unpickling_text(path, error)) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        size = path.stat().st_size
        raise WeightsError(f"{path}: broken or truncated ({size:,} bytes): {error}. Get it again.") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return dict(content)


def _unpickling_text(path: Path, error: Exception) -> str:
    """torch's own text is about switching its safety off; what it refused stands somewhere in there."""
    refused = re.search(r"GLOBAL (\S+)|Can only .*", str(error))
    if refused:
        return (
            f"{path}: refused, the pickle asks to run code or to build objects that are not plain tensors "
            f"({refused[1] or refused[0]}). If you trust its author, load it elsewhere and save only the tensors."
        )
    return f"{path}: broken, truncated or not a weights file ({path.stat().st_size:,} bytes). Get it again."


def read_state_dict(path: str | Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file: its `model` entry if it has one, else the file itself; see `read_weights`."""
    content = read_weights(path, mapped=mapped)
    state = content.get("model", content)
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: its entry 'model' is a {type(state).__name__}, not a dictionary")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return tensors


def copy_strict(
    target: Mapping[str, Tensor], state: Mapping[str, Tensor], *, source: str | Path, hint: str = ""
) -> None:
    """Copy `state` into `target` in place; the keys and shapes must be equal, else WeightsError says how they
    differ. Dtypes are converted to the target's."""
    missing, extra = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    wrong = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(target[name].shape)} in the model"
        for name in target
        if name in state and state[name].shape != target[name].shape
    ]
    problems = [
        f"{title}: {_some(names)}"
        for title, names in (("missing", missing), ("not expected", extra), ("wrong shape", wrong))
        if names
    ]
    if problems:
        text = f"{source} does not fit the model.\n  " + "\n  ".join(problems)
        raise WeightsError(f"{text}\n  {hint}" if hint else text)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(state[name])


def drop_keys(state: Mapping[str, Tensor], patterns: Iterable[str]) -> dict[str, Tensor]:
    """`state` without the keys that match one of the shell patterns (the named allow-list)."""
    patterns = tuple(patterns)
    return {
        name: tensor
        for name, tensor in state.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
