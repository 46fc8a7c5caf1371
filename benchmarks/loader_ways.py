"""How batches of images come to the training device: the plain way, as the original reads them, and ours."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Way:
    """A name, and for ours the switches of the image processor."""

    name: str
    switches: dict[str, bool] | None = field(default_factory=dict)
    """None: plain."""


WAYS = (
    Way("plain", None),
    Way("ours"),
    Way("fast_resize", {"fast_resize": True}),
    Way("fast_resize, fast_decode", {"fast_resize": True, "fast_decode": True}),
)


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
    way: Way, source: str, files: Files, batch_size: int, workers: int, device: torch.device
) -> Iterator[Iterator[Tensor]]:
    """Endless batches (B, 3, S, S) float32 on `device`; the workers end with the block."""
    if way.switches is None:
        dataset = PlainFolder(files.folder) if source == "folder" else plain_tar(files.tar)
        loader = DataLoader(dataset, batch_size, num_workers=workers, pin_memory=device.type == "cuda")
        yield (image.to(device, non_blocking=True) for image, _ in loader)
        return
    ledger = BadSampleMonitor(None, max_share=0.0, max_in_a_row=1)
    sources = [TrainSource(_dataset(source, files, way.switches), batch_size)]
    pin = device.type == "cuda"
    prefetcher = DevicePrefetcher(
        TrainLoader(sources, num_workers=workers, seed=0, ledger=ledger, pin_memory=pin), device
    )
    try:
        yield (batch["image"] for batch in prefetcher)
    finally:
        prefetcher.close()


def _dataset(source: str, files: Files, switches: dict[str, bool]) -> Any:
    builder = {"folder": "cc_sbu_align", "tar": "laion"}[source]
    section = {
        "builder": builder,
        "build_info": {"storage": str(files.folder if source == "folder" else files.tar)},
        "vis_processor": {"train": {"name": "blip2_image_train", "image_size": SIZE, **switches}},
        "text_processor": {"train": {"name": "blip_caption"}},
    }
    return builder_of(builder, bind(DatasetConfig, section, section="datasets", source="loader.py")).build("train")
