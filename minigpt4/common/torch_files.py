"""Files of weights, looked at before torch reads them, and without it: whole? plain tensors, and no code?

`torch.load(weights_only=True)` runs no code, but it decompresses 3 MB into 3 GB, reads past the end of a record whose
pickle claims more, ignores checksums, and builds tensors (sparse, quantised, on no device) that cannot be weights.
"""

import hashlib
import io
import json
import mmap
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open

from minigpt4.common.errors import WeightsError, errors_as
from minigpt4.common.utils import wrapped

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = (SINGLE, PICKLE)
"""Of a model in a directory, in the order of preference; beside each, `NAME.index.json` names those of several."""

ZIP_START = b"PK\x03\x04"
LEGACY_PICKLES = 5
"""Of torch before 1.6: magic number, version, machine, content, names of the storages; their bytes follow."""

_ITEM_BYTES = {"BoolStorage": 1, "ByteStorage": 1, "CharStorage": 1, "UntypedStorage": 1}
_ITEM_BYTES |= {"HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2, "FloatStorage": 4, "IntStorage": 4}
_ITEM_BYTES |= {"DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16}
_DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "bool", "complex64")
_DTYPES += ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "complex128")
PLAIN_GLOBALS = {
    "collections OrderedDict",
    "collections Counter",
    "__builtin__ set",
    "torch Size",
    "torch device",
    "torch.nn.parameter Parameter",
    *(f"torch._utils {name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")),
    "torch._utils _rebuild_parameter",
    *(f"{module} {name}" for module in ("torch", "torch.storage") for name in _ITEM_BYTES),
    *(f"torch {name}" for name in _DTYPES),
}
"""What a pickle may name: all that checkpoints hold, and nothing whose result is larger than its arguments."""

_SIMPLE = {"BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "LONG1", "NONE"}
_UNKNOWN = object()


def reads_pickles(directory: Path) -> bool:
    """Whether loading this LLM directory would unpickle its weights: it has no whole safetensors."""
    has_safetensors = any((directory / name).is_file() for name in (SINGLE, INDEX))
    return not has_safetensors and any((directory / name).is_file() for name in (PICKLE, PICKLE_INDEX))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_whole(path: Path, name: str) -> None:
    """WeightsError unless a download that will be called `name` is a whole file of torch or safetensors."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        drive = "on Google Drive: its download quota is used up, or it is no longer shared"
        text = f"{name}: the server sent a web page in place of the file ({drive})"
        raise WeightsError(f"{text}. Try again in a day, or fetch it with a browser")
    refuse_pointer(path, name)
    with errors_as(WeightsError, f"{name}: broken or truncated, or not a weights file"):
        if name.endswith(".safetensors"):
            with safe_open(path, framework="np"):  # compares its length with the header
                return
        check_torch_file(path)


def refuse_pointer(path: Path, name: str) -> None:
    """WeightsError for what Git leaves in the place of a large file."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head.startswith(ZIP_START) and (what := wrapped(head)):
        raise WeightsError(f"{name}: {what}")


def require_shards(directory: Path) -> None:
    """WeightsError where the index of an LLM's directory names files that are not there."""
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return
        if index.is_file():
            with errors_as(WeightsError, f"model.llama_model: {index}: cannot be read"):
                files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
                missing = [file for file in files if not (directory / file).is_file()]
            if missing:
                counts = f"{len(missing)} of {len(files)} files of weights are missing, such as {missing[0]}"
                raise WeightsError(f"model.llama_model: {directory}: {counts}; fetch them again")
            return


def check_torch_file(path: Path, *, sums: bool = True) -> bool:
    """Whether a file of torch is a zip file, which can be mapped, and not one of torch before 1.6.

    WeightsError for code, objects that are no plain tensors, and sizes that it does not have; other exceptions for what
    is damaged or no file of torch. `sums`: compare all checksums; without, only pickles are read.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) == ZIP_START:
            _check_zip(path, sums)
            return True
        if not path.stat().st_size:
            raise EOFError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_legacy(path, content)
        return False


def _check_zip(path: Path, sums: bool) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        sizes = {entry.filename: entry.file_size for entry in entries}
        root = archive.infolist()[0].filename.split("/")[0] if entries else ""
        end = 0
        if entries and entries[0].header_offset:  # zipfile finds its way in it, torch reads memory at random
            raise _refused(path, "it does not begin with its first entry")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise _refused(path, f"{entry.filename} is compressed ({entry.file_size:,} bytes), torch never does so")
            if entry.header_offset < end:
                raise _refused(path, f"{entry.filename} shares its bytes with another entry")
            end = entry.header_offset + entry.compress_size
            if entry.CRC == 0:
                del entry.CRC  # torch.save can leave checksums out; now zipfile does not miss this one
        if len(sizes) < len(entries):
            raise _refused(path, "two entries have the same name")
        if end > path.stat().st_size:
            raise _refused(path, f"its entries need {end:,} bytes, it has {path.stat().st_size:,}")
        if f"{root}/data.pkl" not in sizes:
            raise _refused(path, "it has no data.pkl, so torch.save did not write it")
        storages = _declared_storages(path, io.BytesIO(archive.read(f"{root}/data.pkl")))
        if sums and (damaged := archive.testzip()):
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    for key, size in storages.items():
        if size > sizes.get(f"{root}/data/{key}", -1):
            raise _refused(path, f"its pickle claims {size:,} bytes of data/{key}, which has not so many")


def _check_legacy(path: Path, content: Any) -> None:
    storages: dict[Any, int] = {}
    for _ in range(LEGACY_PICKLES):
        storages |= _declared_storages(path, content)
    declared, size = sum(storages.values()), path.stat().st_size
    if declared > size:
        raise _refused(path, f"its pickle claims {declared:,} bytes, the file has {size:,}")


def _declared_storages(path: Path, pickle: BinaryIO) -> dict[Any, int]:
    """Bytes of each storage that a pickle asks for, by key. It is read, not run, and its stack followed as far as
    torch's own pickles need: simple values and tuples of them."""
    storages: dict[Any, int] = {}
    memo: dict[int, Any] = {}
    top: list[Any] = [_UNKNOWN]  # of the stack, down to the last mark or to what is unknown
    for opcode, value, _ in pickletools.genops(pickle):
        match opcode.name:
            case "GLOBAL":
                if value not in PLAIN_GLOBALS:
                    name = value.replace(" ", ".")
                    text = f"{path}: refused, the pickle asks to run code or to build more than plain tensors ({name})"
                    raise WeightsError(f"{text}. If you trust its author, load it elsewhere and save only the tensors.")
                top.append(value)
            case name if name in _SIMPLE:
                top.append(value)
            case "BINGET" | "LONG_BINGET":
                top.append(memo.get(value, _UNKNOWN))
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = top[-1] if top else _UNKNOWN
            case "MARK":
                top = []
            case "TUPLE":
                top = [_UNKNOWN, _UNKNOWN if _UNKNOWN in top else tuple(top)]
            case "BINPERSID":
                key, size = _declared(path, top[-1] if top else _UNKNOWN)
                storages[key] = max(size, storages.get(key, 0))
                top = [_UNKNOWN]
            case "PROTO" | "STOP":
                pass
            case _:
                top = [_UNKNOWN]
    return storages


def _declared(path: Path, identifier: Any) -> tuple[Any, int]:
    """Key and bytes of `("storage", type, key, device, count, ...)`."""
    match identifier:
        case ("storage", str(kind), key, _, int(count), *_) if kind.split()[-1] in _ITEM_BYTES and count >= 0:
            return key, count * _ITEM_BYTES[kind.split()[-1]]
    raise _refused(path, "its pickle asks for something that is no storage of a tensor")


def _refused(path: Path, why: str) -> WeightsError:
    return WeightsError(f"{path}: refused, {why}. Get it again, from a source that you trust.")
