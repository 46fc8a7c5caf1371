"""Is a file what it claims to be? Length, hashes, and whether it opens. Nothing here imports torch."""

import hashlib
import json
import zipfile
from pathlib import Path

from tqdm import tqdm

from minigpt4.common.errors import WeightsError

CHUNK = 1 << 20
LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before its zip format (1.6)
WEIGHTS_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}


def digest(path: Path, algorithm: str = "sha256", progress: bool = True) -> str:
    """Hex hash of a file, read in pieces of 1 MiB."""
    state = hashlib.new(algorithm)
    with (
        path.open("rb") as file,
        tqdm(
            total=path.stat().st_size,
            desc=f"{algorithm} {path.name}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None if progress else True,
        ) as bar,
    ):
        while chunk := file.read(CHUNK):
            state.update(chunk)
            bar.update(len(chunk))
    return state.hexdigest()


def check_opens(path: Path, name: str | None = None) -> None:
    """Raise WeightsError unless `path` is whole: a torch zip, a torch pickle (old format) or safetensors.

    `name` is what the file will be called, where `path` is a temporary one.
    """
    name = name or path.name
    with path.open("rb") as file:
        head = file.read(512)
    check_not_text(head, name)
    if zipfile.is_zipfile(path):
        _check_torch_zip(path, name)
    elif head.startswith(b"PK"):
        raise WeightsError(f"{name}: a torch file whose end is missing; delete it and download it again")
    elif name.endswith(".safetensors"):
        _check_safetensors(path, name)
    elif not head.startswith(LEGACY_TORCH_MAGIC):
        raise WeightsError(f"{name}: neither a torch file nor safetensors (begins with {head[:8]!r})")


def check_not_text(head: bytes, name: str) -> None:
    """Raise WeightsError if the first bytes are a web page or a Git LFS pointer in place of weights."""
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{name}: the server sent a web page in place of the file (on Google Drive: the file's download "
            "quota is used up, or it is no longer shared). Try again in a day, or fetch it with a browser"
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{name}: a Git LFS pointer, not the weights; run `git lfs pull` there, or download it again"
        )


def _check_torch_zip(path: Path, name: str) -> None:
    with zipfile.ZipFile(path) as archive:
        if not any(entry.endswith("/data.pkl") or entry == "data.pkl" for entry in archive.namelist()):
            raise WeightsError(f"{name}: a zip archive, but not one that torch.save wrote (no data.pkl in it)")


def _check_safetensors(path: Path, name: str) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise WeightsError(f"{name}: not a safetensors file (its header would be {length} bytes long)")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise WeightsError(f"{name}: broken safetensors header: {error}") from error
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise WeightsError(f"{name}: {size} bytes long, its header says {wanted}; download it again")
