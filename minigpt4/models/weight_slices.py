"""Single tensors, and rows of them, from the weight files of an LLM directory, which stay on the disk.

Formats: safetensors and torch's zip files, whole or with an index, as transformers saves them. Files are mapped into
memory, so what several processes of a machine read is there once.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minigpt4.common.errors import WeightsError
from minigpt4.common.torch_files import check_torch_file

FILES = ("model.safetensors", "pytorch_model.bin")
"""In the order of preference; beside each, `NAME.index.json` tells which file of several holds a tensor."""


class WeightSlices:
    """The tensors of an LLM directory by name; WeightsError for files that are missing or broken."""

    def __init__(self, directory: Path) -> None:
        self._readers: dict[str, _Safetensors | _TorchFile] = {}
        for path in _files(directory):
            reader = _opened(path)
            self._readers |= dict.fromkeys(reader.names(), reader)

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._readers)

    def shape(self, name: str) -> torch.Size:
        """Of a whole tensor."""
        return self._readers[name].shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A part of a tensor along its first dimension, on the CPU, in the file's type."""
        return self._readers[name].rows(name, start, stop)


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._file.get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._file.get_slice(name)[start:stop]


class _TorchFile:
    def __init__(self, path: Path) -> None:
        check_torch_file(path, sums=False)
        self._state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> torch.Size:
        return self._state[name].shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name][start:stop]


def _opened(path: Path) -> _Safetensors | _TorchFile:
    try:
        return _Safetensors(path) if path.suffix == ".safetensors" else _TorchFile(path)
    except FileNotFoundError as error:
        raise WeightsError(f"model.llama_model: {path}: no such file, but the index names it") from error
    except WeightsError as error:
        raise WeightsError(f"model.llama_model: {error}") from error
    except Exception as error:
        raise WeightsError(
            f"model.llama_model: {path}: broken, or not a file that can be mapped into memory ({error}); "
            "run.parallel: fsdp needs safetensors, or files that torch 1.6 or newer wrote"
        ) from error


def _files(directory: Path) -> list[Path]:
    for name in FILES:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.is_file():
            return [directory / file for file in _of_index(index)]
    raise WeightsError(f"model.llama_model: {directory} holds none of {', '.join(FILES)}")


def _of_index(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"model.llama_model: {index}: cannot be read: {error}") from error
