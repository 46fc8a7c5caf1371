"""JPEG files, drawn with the spectrum of photos, and two ways in which they come to the training device in batches:
the plain one, as the original reads them, and ours."""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from minigpt4.common.binding import bind
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets import BadSampleMonitor, DevicePrefetcher, TrainLoader, TrainSource, builder_of
from minigpt4.processors.blip_processors import CLIP_MEAN, CLIP_STD

SIZE = 224
PLAIN = transforms.Compose(
    [
        transforms.Resize((SIZE, SIZE), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(CLIP_MEAN, CLIP_STD),
    ]
)
SOURCES = ("folder", "tar")
WAYS = ("plain", "ours")
ENDLESS = 1 << 40
DISTINCT = 16
"""Drawn pictures; more files repeat them."""


@dataclass(frozen=True)
class Files:
    """The same pictures in a folder, `image/<n>.jpg` and `filter_cap.json`, and in a tar as img2dataset writes it."""

    folder: Path
    tar: Path

    def write(self, contents: Sequence[bytes]) -> None:
        """Both, from JPEG files."""
        (self.folder / "image").mkdir(parents=True)
        records = [{"image_id": str(number), "caption": "A picture."} for number in range(len(contents))]
        (self.folder / "filter_cap.json").write_text(json.dumps({"annotations": records}))
        metadata = {"caption": "A picture.", "url": "http://localhost/picture.jpg", "status": "success"}
        with wds.TarWriter(str(self.tar)) as tar:
            for number, content in enumerate(contents):
                (self.folder / "image" / f"{number}.jpg").write_bytes(content)
                tar.write({"__key__": f"{number:09d}", "jpg": content, "txt": "A picture.", "json": metadata})

    def remove(self) -> None:
        """Delete them."""
        shutil.rmtree(self.folder)
        self.tar.unlink()


def pictures(width: int, height: int, count: int) -> list[bytes]:
    """`count` JPEG files, of which DISTINCT differ."""
    distinct = []
    for seed in range(min(count, DISTINCT)):
        drawn(width, height, seed).save(file := io.BytesIO(), "JPEG", quality=90)
        distinct.append(file.getvalue())
    return [distinct[number % len(distinct)] for number in range(count)]


def drawn(width: int, height: int, seed: int) -> Image.Image:
    """Noise in which, as in photos, a detail is the weaker the finer it is, and the channels are alike."""
    chance = np.random.default_rng(seed)
    fine = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).clip(1 / max(width, height))
    waves = (chance.normal(size=(2, *fine.shape)) / fine**1.2 for _ in range(4))
    grey, *colours = (np.fft.irfft2(real + 1j * imaginary, (height, width)) for real, imaginary in waves)
    levels = [128 + 50 * grey / grey.std() + 15 * colour / colour.std() for colour in colours]
    return Image.fromarray(np.stack(levels, axis=-1).clip(0, 255).astype(np.uint8))


class PlainFolder(Dataset):
    """Image files over and over."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted((folder / "image").iterdir())

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image = Image.open(self.files[index % len(self.files)]).convert("RGB")
        return PLAIN(image), "A picture."


def _decoded(content: bytes) -> Tensor:
    return PLAIN(Image.open(io.BytesIO(content)).convert("RGB"))


def plain_tar(path: Path) -> wds.DataPipeline:
    """A shard over and over."""
    return wds.DataPipeline(
        wds.ResampledShards([str(path)]),
        wds.tarfile_to_samples(),
        wds.to_tuple("jpg", "txt"),
        wds.map_tuple(_decoded, bytes.decode),
    )


@contextmanager
def batches(
    way: str, source: str, files: Files, batch_size: int, workers: int, device: torch.device
) -> Iterator[Iterator[Tensor]]:
    """Endless batches (B, 3, S, S) float32 on `device`; the workers end with the block."""
    if way == "plain":
        dataset = PlainFolder(files.folder) if source == "folder" else plain_tar(files.tar)
        loader = DataLoader(dataset, batch_size, num_workers=workers, pin_memory=device.type == "cuda")
        yield (image.to(device, non_blocking=True) for image, _ in loader)
        return
    ledger = BadSampleMonitor(None, max_share=0.0, max_in_a_row=1)
    sources = [TrainSource(_dataset(source, files), batch_size)]
    pin = device.type == "cuda"
    prefetcher = DevicePrefetcher(
        TrainLoader(sources, num_workers=workers, seed=0, ledger=ledger, pin_memory=pin), device
    )
    try:
        yield (batch["image"] for batch in prefetcher)
    finally:
        prefetcher.close()


def _dataset(source: str, files: Files) -> Any:
    builder = {"folder": "cc_sbu_align", "tar": "laion"}[source]
    section = {
        "builder": builder,
        "build_info": {"storage": str(files.folder if source == "folder" else files.tar)},
        "vis_processor": {"train": {"name": "blip2_image_train", "image_size": SIZE}},
        "text_processor": {"train": {"name": "blip_caption"}},
    }
    return builder_of(builder, bind(DatasetConfig, section, section="datasets", source="loader.py")).build("train")
