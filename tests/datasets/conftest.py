"""Real files to read: images of every kind, tars, annotation files; and loaders over them."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4.common.binding import bind
from minigpt4.common.errors import SampleError
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets import BadSampleMonitor, BaseDataset, EvalLoader, TrainLoader, TrainSource, builder_of
from minigpt4.processors import Uint8Image

SIZE = 4


def picture(seed: int = 0, mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (6, 5), **save: Any) -> bytes:
    """An encoded image whose pixels depend on `seed`."""
    width, height = size
    pixels = bytes((seed * 37 + place * 11) % 256 for place in range(3 * width * height))
    file = io.BytesIO()
    Image.frombytes("RGB", size, pixels).convert(mode).save(file, kind, **save)
    return file.getvalue()


@dataclass
class Files:
    """Writes data into one folder."""

    folder: Path

    def tar(self, name: str, members: Iterable[tuple[str, bytes]]) -> Path:
        """A tar of these members, in this order."""
        path = self.folder / name
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    def shard(self, name: str, keys: Iterable[int]) -> Path:
        """A shard of good samples as img2dataset writes them."""
        return self.tar(name, (member for key in keys for member in self.pair(key)))

    @staticmethod
    def pair(key: int) -> list[tuple[str, bytes]]:
        caption = json.dumps({"caption": f"A photo of {key}."}).encode()
        return [(f"{key:09d}.png", picture(key)), (f"{key:09d}.json", caption)]

    def images(self, keys: Iterable[Any]) -> Path:
        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        for seed, key in enumerate(keys):
            (folder / f"{key}.jpg").write_bytes(picture(seed))
        return folder

    def json(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.write_text(json.dumps(content))
        return path

    def shards(self, sizes: Iterable[int], name: str = "birds") -> BaseDataset:
        """A dataset of shards of these sizes, keys counted from 0."""
        first, number = 0, -1
        for number, size in enumerate(sizes):
            self.shard(f"{name}-{number}.tar", range(first, first + size))
            first += size
        return self.dataset("image_caption_shards", name, storage=f"{self.folder}/{name}-{{0..{number}}}.tar")

    def records(self, count: int, name: str = "cats", missing: Iterable[int] = ()) -> BaseDataset:
        """A dataset of a JSON file; the images of `missing` do not exist."""
        images = str(self.images(key for key in range(count) if key not in set(missing)))
        file = self.json(f"{name}.json", [{"image_id": str(key), "caption": f"Cat {key}."} for key in range(count)])
        return self.dataset("image_caption_json", name, ann_path=str(file), image_path=images)

    def dataset(self, builder: str, name: str = "birds", split: str = "train", **info: Any) -> BaseDataset:
        return builder_of(name, self.section(builder, **info)).build(split)

    @staticmethod
    def section(builder: str, **info: Any) -> DatasetConfig:
        vision = {part: {"name": f"blip2_image_{part}", "image_size": SIZE} for part in ("train", "eval")}
        values = {"builder": builder, "build_info": info, "vis_processor": vision}
        return bind(DatasetConfig, values, section="datasets.test", source="test.yaml")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def loaders() -> Iterator[SimpleNamespace]:
    """`loaders.train(*sources)`, closed after the test, and `loaders.evaluate(dataset)`."""
    opened = []

    def train(*sources: BaseDataset | TrainSource, batch_size: int = 3, **keys: Any) -> TrainLoader:
        mixed = [s if isinstance(s, TrainSource) else TrainSource(s, batch_size) for s in sources]
        opened.append(TrainLoader(mixed, **{"num_workers": 0, "seed": 7, "ledger": lenient_monitor(), **keys}))
        return opened[-1]

    def evaluate(dataset: BaseDataset, batch_size: int = 3, **keys: Any) -> EvalLoader:
        return EvalLoader(dataset, batch_size, **{"num_workers": 0, "ledger": lenient_monitor(), **keys})

    yield SimpleNamespace(train=train, evaluate=evaluate)
    for loader in opened:
        loader.close()


def lenient_monitor(folder: Path | None = None) -> BadSampleMonitor:
    return BadSampleMonitor(folder, max_share=1.0, max_in_a_row=1000)


def read(dataset: BaseDataset, readers: int = 1) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Good samples by their id, and the reasons of the bad ones."""
    good, bad = {}, []
    for shard in range(dataset.num_shards(readers)):
        for lazy in dataset.open(shard, readers, None):
            try:
                sample = lazy.load()
                good[sample["image_id"]] = sample
            except SampleError as error:
                bad.append(str(error))
    return good, bad


def take(loader: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return list(islice(loader, count))


def ids(batches: Iterable[dict[str, Any]]) -> list[str]:
    return [identity for batch in batches for identity in batch["image_id"]]


def run(loader: Iterable[dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Batches, and the state after each as a checkpoint would hold it; the first is the state before all."""
    states, batches = [json.dumps(loader.state_dict())], []
    for _ in range(count):
        batches.append(next(loader))
        states.append(json.dumps(loader.state_dict()))
    return batches, [json.loads(state) for state in states]


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Equal batches, images bit for bit, on their way to the device or there."""
    shown = [{key: seen(value) for key, value in batch.items()} for batch in (first, second)]
    tensors = [{key: one.pop(key) for key in ("image", "length") if key in one} for one in shown]
    same_kinds = shown[0] == shown[1] and tensors[0].keys() == tensors[1].keys()
    return same_kinds and all(torch.equal(one, tensors[1][key]) for key, one in tensors[0].items())


def seen(image: Any) -> Any:
    """Pixels as the model reads them; anything else as it is."""
    return image.normalised() if isinstance(image, Uint8Image) else image


@pytest.fixture
def tools() -> SimpleNamespace:
    """The functions above, for test modules."""
    functions = (picture, read, take, ids, run, same, seen, lenient_monitor)
    return SimpleNamespace(size=SIZE, **{function.__name__: function for function in functions})
