"""What an image costs stage by stage, the plain way and ours, in milliseconds."""

import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import webdataset as wds
from loader_ways import PLAIN, Files
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from minigpt4.datasets.datasets.image_caption_shards import read_tar
from minigpt4.processors import Blip2ImageTrainProcessor, Uint8Image, process_image

READ_FILE, READ_TAR, DECODE, RESIZE = "read the file", "read it from a tar", "decode", "resize"
NORMALISE, COLLATE, SEND = "normalise", "collate", "to the main process"
STAGES = (READ_FILE, READ_TAR, DECODE, RESIZE, NORMALISE, COLLATE, SEND)
SENT = 20
"""Batches that are sent."""
LONGEST = 32
"""Images that are looked at."""


def stages(files: Files, batch_size: int) -> dict[str, tuple[float, float]]:
    """(plain, ours) of each stage. Ours normalises a batch, and on the training device: here the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        return _stages(files, batch_size)
    finally:
        torch.set_num_threads(threads)


def _stages(files: Files, batch_size: int) -> dict[str, tuple[float, float]]:
    paths = sorted((files.folder / "image").iterdir())[:LONGEST]
    resize, *normalise = PLAIN.transforms
    processor = Blip2ImageTrainProcessor()
    read, contents = _each(paths, lambda path: path.read_bytes())
    decode_plain, decoded = _each(contents, lambda content: Image.open(io.BytesIO(content)).convert("RGB"))
    decode, _ = _each(contents, lambda content: process_image(_unchanged, content))
    resize_plain, resized = _each(decoded, resize)
    resize_ours, levels = _each(decoded, processor.uint8)
    normalise_plain, tensors = _each(resized, lambda image: normalise[1](normalise[0](image)))
    batch_plain = _repeated(tensors, batch_size)
    batch = _repeated(levels, batch_size)
    collate_plain, (stacked, *_) = _each([batch_plain] * 5, torch.stack)
    collate, (joined, *_) = _each([batch] * 5, Uint8Image.joined)
    normalise_ours, _ = _each([joined] * 5, Uint8Image.normalised)
    plain_tar = _through(wds.tarfile_samples([{"url": str(files.tar)}]))
    return {
        READ_FILE: (read, read),
        READ_TAR: (plain_tar, _through(read_tar(str(files.tar), []))),
        DECODE: (decode_plain, decode),
        RESIZE: (resize_plain, resize_ours),
        NORMALISE: (normalise_plain, normalise_ours / batch_size),
        COLLATE: (collate_plain / batch_size, collate / batch_size),
        SEND: (_sending(stacked) / batch_size, _sending(joined) / batch_size),
    }


def _unchanged(value: Any) -> Any:
    return value


def _repeated(items: list[Any], count: int) -> list[Any]:
    return [items[number % len(items)] for number in range(count)]


def _each(items: Iterable[Any], call: Callable[[Any], Any]) -> tuple[float, list[Any]]:
    """Median milliseconds of a call, and what the calls gave."""
    times, results = [], []
    for item in items:
        start = time.perf_counter()
        results.append(call(item))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), results


def _through(samples: Iterable[Any]) -> float:
    """Milliseconds a sample."""
    start = time.perf_counter()
    count = sum(1 for _ in samples)
    return 1e3 * (time.perf_counter() - start) / count


class _Same(IterableDataset):
    """One batch, again and again, in memory of its own, as a batch that was just made is."""

    def __init__(self, batch: torch.Tensor | Uint8Image) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        for _ in range(SENT):
            yield _copied(self.batch)


def _copied(batch: torch.Tensor | Uint8Image) -> torch.Tensor | Uint8Image:
    return batch.clone() if isinstance(batch, torch.Tensor) else Uint8Image(batch.pixels.clone(), batch.mean, batch.std)


def _sending(batch: torch.Tensor | Uint8Image) -> float:
    """Milliseconds from a worker, which does nothing else, to the main process; without making the copy."""
    copy, _ = _each(range(SENT), lambda _: _copied(batch))
    loader = iter(DataLoader(_Same(batch), batch_size=None, num_workers=1, collate_fn=_unchanged))
    next(loader)
    start = time.perf_counter()
    for _ in loader:
        pass
    return max(0.0, 1e3 * (time.perf_counter() - start) / (SENT - 1) - copy)
