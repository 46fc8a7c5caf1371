"""How batches of images come to the training device: the plain way, as the original reads them, and ours."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
ENDLESS = 1 << 40


WAYS = ("plain", "ours")


@dataclass(frozen=True)
class Files:
    """The same pictures in a folder and in a tar."""

    folder: Path
    tar: Path

    def remove(self) -> None:
        """Delete them."""
        shutil.rmtree(self.folder)
        self.tar.unlink()


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
