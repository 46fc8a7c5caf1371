"""Convert the pickled weights of an LLM (pytorch_model*.bin) into safetensors, once.

    python scripts/to_safetensors.py weights/vicuna-7b                       # beside the .bin files
    python scripts/to_safetensors.py weights/vicuna-7b --output /data/vicuna-7b-bf16 --dtype bf16

Whatever reads the directory takes safetensors where there are any, so nothing else has to be set, and the .bin files
may then be deleted. The tensors are the same to the bit unless --dtype changes their type. A conversion that was
stopped leaves the .bin files in charge; run the command again. More: docs/weights.md.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from minigpt4.common.checkpoint import read_weights, require_plain
from minigpt4.common.errors import WeightsError, errors_as
from minigpt4.common.torch_files import INDEX, PICKLE, PICKLE_INDEX, SINGLE
from minigpt4.common.utils import exit_status, replace_durably
from minigpt4.models.base_model import DTYPES

WEIGHTS_PATTERNS = ("*.bin", "*.bin.index.json", "*.safetensors", "*.safetensors.index.json", "*.part", "*.pt", "*.pth")
"""Files of an LLM directory that hold or list weights; all others belong beside the converted ones."""


def to_safetensors(source: Path, target: Path, dtype: str | None = None, shard_size: str = "2GB") -> None:
    """Convert the pickles of an LLM directory; another `target` also gets its other files.

    Raises WeightsError: a file is missing, broken or unsafe, the disk refuses, or `target` holds safetensors already.
    """
    with errors_as(WeightsError, f"{source}: cannot be converted into {target}"):
        if (target / SINGLE).is_file() or (target / INDEX).is_file():
            raise WeightsError(f"{target}: holds safetensors already, which are what is loaded; nothing is converted")
        pickles = _pickles(source)
        tensors = _read(pickles, DTYPES.get(dtype))
        folder = target / ".converting"
        shutil.rmtree(folder, ignore_errors=True)  # left by a conversion that was killed
        folder.mkdir(parents=True)
        try:
            save_torch_state_dict(tensors, folder, max_shard_size=shard_size)
            others = source.iterdir() if target.resolve() != source.resolve() else ()
            for file in others:  # configuration, tokenizer and whatever else lies beside the weights
                if file.is_file() and not any(file.match(pattern) for pattern in WEIGHTS_PATTERNS):
                    shutil.copyfile(file, folder / file.name)
            # The last one puts safetensors in charge.
            for file in sorted(folder.iterdir(), key=lambda file: file.name in (SINGLE, INDEX)):
                shutil.copymode(pickles[0], file)  # safetensors makes private files
                replace_durably(file, target / file.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _read(pickles: list[Path], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The tensors of all pickles, mapped from disk unless their type changes."""
    tensors: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for file in pickles:
        for name, tensor in read_weights(file, mapped=True).items():
            if not isinstance(tensor, torch.Tensor):
                raise WeightsError(f"{file}: {name!r} is a {type(tensor).__name__}; an LLM's file holds tensors")
            require_plain(name, tensor, file)
            if name in tensors:
                raise WeightsError(f"{file}: holds {name!r}, and so does another file")
            if dtype is not None and tensor.is_floating_point():
                cast = tensor.to(dtype)
                if cast.isinf().any() and not tensor.isinf().any():
                    raise WeightsError(
                        f"{file}: {dtype} does not hold the numbers of {name}; take --dtype bf16 or fp32"
                    )
                tensor = cast
            if tensor.untyped_storage().data_ptr() in memory:  # safetensors know no aliases
                tensor = tensor.clone()
            memory.add(tensor.untyped_storage().data_ptr())
            tensors[name] = tensor
    return tensors


def _pickles(directory: Path) -> list[Path]:
    """The files that a reader would unpickle."""
    index = directory / PICKLE_INDEX
    if (directory / PICKLE).is_file():
        return [directory / PICKLE]
    if not index.is_file():
        raise WeightsError(f"{directory}: has neither {PICKLE} nor {PICKLE_INDEX}; there is nothing to convert")
    with errors_as(WeightsError, f"{index}: broken, it has no readable weight_map"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(directory / name for name in names)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the LLM, with config.json and pytorch_model*.bin")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the new files go (the same folder)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the new weights (as they are)")
    args = parser.parse_args(argv)
    target = args.output or args.directory
    return exit_status(lambda: to_safetensors(args.directory, target, args.dtype) or print(f"{target}: converted"))


if __name__ == "__main__":
    sys.exit(main())
