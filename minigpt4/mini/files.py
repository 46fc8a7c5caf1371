"""The mini world on disk, in the formats of the real data sets.

data/mini/
  stage1/{00000..}.tar              tar shards as img2dataset writes them: NNNNNNNNN.jpg, .json, .txt
  cc_sbu_align/                     filter_cap.json and image/
  flickr30k/                        flickr_annotations_30k.csv and flickr30k-images/
  scenes_test.json                  what the test images really show, by image id
  world.json                        sizes and seed; written last
"""

import csv
import io
import json
import logging
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from minigpt4.mini.scenes import (
    ATTRIBUTION,
    SIDE,
    Scene,
    alt_text,
    detailed_description,
    draw,
    five_captions,
    sample_scenes,
)

log = logging.getLogger(__name__)

WORLD_FILE = "world.json"
TRUTH_FILE = "scenes_test.json"
_FORMAT = 4  # counts up when the same sizes and seed would give other files
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class WorldSize:
    """How many scenes of each kind, and the seed of all of them."""

    stage1: int = 2000
    stage2: int = 300
    flickr_train: int = 800
    flickr_val: int = 40
    flickr_test: int = 100
    per_shard: int = 500
    seed: int = 0

    @property
    def total(self) -> int:
        return self.stage1 + self.stage2 + self.flickr_train + self.flickr_val + self.flickr_test


def write_world(folder: Path, size: WorldSize) -> bool:
    """Draw and write everything; False if `folder` holds this world already.

    A world of other sizes, or an unfinished one, is written again.
    """
    wanted = {"format": _FORMAT, **asdict(size)}
    card = folder / WORLD_FILE
    if card.is_file() and json.loads(card.read_text(encoding="utf-8")) == wanted:
        return False
    card.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=size.total, desc="Drawing scenes", unit=" scenes", disable=None) as bar:

        def scenes(split: str, first: int, count: int) -> Iterator[Scene]:
            for scene in sample_scenes(split, count, size.seed, first):
                yield scene
                bar.update()

        _write_shards(_fresh(folder / "stage1"), scenes("train", 0, size.stage1), size.per_shard)
        _write_detailed(_fresh(folder / "cc_sbu_align"), scenes("train", size.stage1, size.stage2))
        first = size.stage1 + size.stage2
        parts = [("train", first, size.flickr_train), ("val", 0, size.flickr_val), ("test", 0, size.flickr_test)]
        rows = [(part[0], scene) for part in parts for scene in scenes(*part)]
        truth = _write_flickr(_fresh(folder / "flickr30k"), rows)
    _write_json(folder / TRUTH_FILE, truth)
    (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n", encoding="utf-8")
    _write_json(card, wanted)
    return True


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _jpeg(scene: Scene) -> bytes:
    file = io.BytesIO()
    draw(scene)[0].save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_shards(folder: Path, scenes: Iterator[Scene], per_shard: int) -> None:
    number = 0
    while shard := list(islice(scenes, per_shard)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as file:
            for place, scene in enumerate(shard):
                key, caption = f"{number:05d}{place:04d}", alt_text(scene)
                card = {"caption": caption, "key": key, "status": "success", "width": SIDE, "height": SIDE}
                members = {"jpg": _jpeg(scene), "json": json.dumps(card).encode(), "txt": caption.encode()}
                for ending, content in members.items():
                    entry = tarfile.TarInfo(f"{key}.{ending}")
                    entry.size = len(content)
                    file.addfile(entry, io.BytesIO(content))
        number += 1


def _write_detailed(folder: Path, scenes: Iterator[Scene]) -> None:
    (folder / "image").mkdir()
    annotations = []
    for index, scene in enumerate(scenes):
        (folder / "image" / f"{index}.jpg").write_bytes(_jpeg(scene))
        annotations.append({"image_id": str(index), "caption": detailed_description(scene)})
    _write_json(folder / "filter_cap.json", {"annotations": annotations})


def _write_flickr(folder: Path, rows: list[tuple[str, Scene]]) -> dict[str, dict]:
    """CSV and images; returns what the test images show, by image id."""
    images = folder / "flickr30k-images"
    images.mkdir()
    truth = {}
    with (folder / "flickr_annotations_30k.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for number, (split, scene) in enumerate(rows):
            image_id = f"{1_000_000 + number}"
            (images / f"{image_id}.jpg").write_bytes(_jpeg(scene))
            sentence_ids = json.dumps(list(range(5 * number, 5 * number + 5)))
            writer.writerow([json.dumps(five_captions(scene)), sentence_ids, split, f"{image_id}.jpg", number])
            if split == "test":
                truth[image_id] = scene.record()
    return truth
