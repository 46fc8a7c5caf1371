"""Convert the pickled weights of an LLM (pytorch_model*.bin) into safetensors, once.

    python scripts/to_safetensors.py weights/vicuna-7b                       # beside the .bin files
    python scripts/to_safetensors.py weights/vicuna-7b --output /data/vicuna-7b-safetensors
    python scripts/to_safetensors.py weights/vicuna-7b --output /data/vicuna-7b-bf16 --dtype bf16
Whatever reads the directory takes safetensors where there are any, so nothing else has to be set, and the .bin files
may then be deleted. The tensors are the same to the bit unless --dtype changes their type. A conversion that was
stopped goes on when the same command is run again; until it is whole the .bin files are what is read. More:
docs/weights.md.

    model-00001.safetensors, model-00002.safetensors, ...    tensors in the order of the pickles, about 1 GiB a file
    model.safetensors.index.json                             written last: without it readers go on taking the pickles
A shard gets its name when it is whole and says in its header what it was made from, so a conversion that was killed
goes on with the first shard that is missing, and one from other pickles or into another type starts anew.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigpt4.common.checkpoint import read_weights, require_plain
from minigpt4.common.errors import WeightsError, errors_as
from minigpt4.common.torch_files import INDEX, PICKLE, PICKLE_INDEX, SINGLE
from minigpt4.common.utils import exit_status, quick_hash

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30
WEIGHTS_PATTERNS = ("*.bin", "*.bin.index.json", "*.safetensors", "*.safetensors.index.json", "*.part", "*.pt", "*.pth")
"""Files of an LLM directory that hold or list weights; all others belong beside the converted ones."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_ORIGIN = "converted_from"
"""Key of what a file was made from, in a shard's header and in the index."""

Shard = dict[str, Tensor]


def to_safetensors(source: Path, target: Path | None = None, dtype: str | None = None) -> list[Path]:
    """Convert the pickles of an LLM directory.

    Args:
        source: the directory.
        target: where the safetensors go, with copies of all files that are no weights; `source` itself by default,
            where the pickles stay.
        dtype: a name of DTYPES for all floating-point tensors; as they are by default.

    Returns:
        The shards that were written, none if all were there.

    Raises:
        WeightsError: a file is missing, broken or unsafe, the disk refuses, or `target` holds safetensors that were
            not made here.
    """
    target = target or source
    with errors_as(WeightsError, f"{source}: cannot be converted"):
        origin = json.dumps({"files": [quick_hash(file) for file in _pickles(source)], "dtype": dtype})
        _refuse_foreign(target)
        try:
            return _convert(source, target, dtype, origin)
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                f"{target}: cannot be written: {error}. Shards that are whole stay; start again to go on"
            ) from error


def _convert(source: Path, target: Path, dtype: str | None, origin: str) -> list[Path]:
    if _is_whole(target, origin):
        return []
    target.mkdir(parents=True, exist_ok=True)
    (target / INDEX).unlink(missing_ok=True)  # shards of another conversion are about to be replaced
    written, weight_map, size = [], {}, 0
    for number, shard in enumerate(_shards(_pickles(source)), start=1):
        path = target / f"model-{number:05d}.safetensors"
        if _header(path) != (origin, set(shard)):
            _write_shard(path, _converted(shard, dtype), origin)
            log.info("%s: %d tensors", path, len(shard))
            written.append(path)
        weight_map |= dict.fromkeys(shard, path.name)
        size += path.stat().st_size
    if target.resolve() != source.resolve():
        for file in sorted(source.iterdir()):  # configuration, tokenizer and whatever else lies beside the weights
            if file.is_file() and not any(file.match(pattern) for pattern in WEIGHTS_PATTERNS):
                _write(target / file.name, lambda part, file=file: shutil.copyfile(file, part))
    index = {"metadata": {"total_size": size, _ORIGIN: origin}, "weight_map": weight_map}
    _write(target / INDEX, lambda part: part.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8"))
    for path in target.glob("model-?????.safetensors"):  # an earlier conversion left some that this one does not have
        if path.name not in weight_map.values() and _header(path)[0] is not None:
            path.unlink()
    return written


def _pickles(directory: Path) -> list[Path]:
    """The files that a reader would unpickle, in the order of the index."""
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such directory")
    if (directory / PICKLE).is_file():
        return [directory / PICKLE]
    index = directory / PICKLE_INDEX
    if not index.is_file():
        raise WeightsError(f"{directory}: has neither {PICKLE} nor {PICKLE_INDEX}; there is nothing to convert")
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: broken, it has no readable weight_map ({error}). Get it again.") from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise WeightsError(f"{index}: names files that are not there: {', '.join(missing)}. Get them again.")
    return sorted(directory / name for name in names)


def _refuse_foreign(target: Path) -> None:
    """Safetensors that somebody else put there are what is loaded; they are neither needed again nor overwritten."""
    index = target / INDEX
    if (target / SINGLE).is_file() or (index.is_file() and _origin_of_index(index) is None):
        raise WeightsError(
            f"{target}: holds safetensors already, which were not made from its pickles by this command and are what "
            "is loaded. To convert the pickles all the same, give another folder by --output"
        )


def _origin_of_index(index: Path) -> str | None:
    try:
        return json.loads(index.read_text(encoding="utf-8"))["metadata"][_ORIGIN]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(target: Path, origin: str) -> bool:
    index = target / INDEX
    if _origin_of_index(index) != origin:
        return False
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(_header(target / name)[0] == origin for name in names)


def _header(path: Path) -> tuple[str | None, set[str]]:
    """What a shard was made from, and its tensors; None for a file that is missing, cut off or not ours."""
    try:
        with safe_open(path, framework="pt") as file:  # refuses a file whose length is not that of its header
            return (file.metadata() or {}).get(_ORIGIN), set(file.keys())
    except (OSError, SafetensorError):
        return None, set()


def _shards(files: list[Path]) -> Iterator[Shard]:
    """Tensors of the pickles, mapped from disk, about SHARD_BYTES at a time; only one pickle is open at a time."""
    seen: dict[str, Path] = {}
    for file in files:
        content = read_weights(file, mapped=True)
        _require_tensors(file, content, seen)
        shard: Shard = {}
        for name, tensor in content.items():
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
                yield shard
                shard = {}
            shard[name] = tensor
        if shard:
            yield shard


def _require_tensors(file: Path, content: Mapping[str, Any], seen: dict[str, Path]) -> None:
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{file}: its entry {name!r} is a {type(value).__name__}; an LLM's file holds tensors")
        require_plain(name, value, file)
        if name in seen:
            raise WeightsError(f"{file}: holds {name!r}, and so does {seen[name]}; which one counts cannot be told")
        seen[name] = file


def _converted(shard: Shard, dtype: str | None) -> Shard:
    """Contiguous tensors, each with memory of its own: tied ones are written twice, for safetensors know no aliases."""
    memory: set[int] = set()
    tensors = {}
    for name, tensor in shard.items():
        tensor = _cast(name, tensor, dtype).contiguous()
        if tensor.untyped_storage().data_ptr() in memory:
            tensor = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _cast(name: str, tensor: Tensor, dtype: str | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(DTYPES[dtype])
    if dtype == "fp16" and not bool(cast.isfinite().all()) and bool(tensor.isfinite().all()):
        raise WeightsError(f"{name}: has numbers above 65,504, which fp16 does not hold; take --dtype bf16 or fp32")
    return cast


def _write_shard(path: Path, tensors: Shard, origin: str) -> None:
    _write(path, lambda part: save_file(tensors, part, metadata={"format": "pt", _ORIGIN: origin}))


def _write(path: Path, write: Any) -> None:
    """A whole file under its name, on disk, or none; readable for whoever may read other new files."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    part.touch()
    mode = part.stat().st_mode
    write(part)
    part.chmod(mode)  # the writer of safetensors makes private files
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder of the LLM, with config.json and pytorch_model*.bin")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the new files go (the same folder)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the new weights (as they are)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Convert, and say what there is now."""
    target = args.output or args.directory
    written = to_safetensors(args.directory, target, args.dtype)
    size = sum(path.stat().st_size for path in written) / 1e9
    print(f"{target}: {len(written)} files written, {size:.1f} GB" if written else f"{target}: nothing to do")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read, 130 stopped by Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args(argv)
    try:
        return exit_status(lambda: run(args))
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
