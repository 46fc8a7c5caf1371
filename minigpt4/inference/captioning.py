"""Captions of many images as JSON lines, written batch by batch, so that a stopped run goes on with what is there.

captions.jsonl             {"image_id": "1000092795", "image": "1000092795.jpg", "caption": "Two men ..."}
                           {"image_id": "1000092796", "image": "1000092796.jpg", "error": "...: not an image"}
captions.made_from.json    provenance: checkpoint, prompt, decoding, model
"""

import dataclasses
import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minigpt4.common.checkpoint import file_sha256, find_weights
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.run_folder import versions
from minigpt4.common.utils import JsonLines, as_json, escaped, refused, write_whole
from minigpt4.inference.image_list import ImageBatch, ImageFile, ImageList, cut, read_batches
from minigpt4.inference.pipeline import Pipeline, PromptRules, frozen_files, image_provenance
from minigpt4.models.feature_cache import cached_numbers, feature_cache
from minigpt4.models.fsdp import sharding, uneven_inputs

log = logging.getLogger(__name__)

OPTION = "--output"
SHOWN_CHANGES = 3
SHOWN_CHARACTERS = 60
"""Of a value in an error."""
OUT_OF_MEMORY = (
    "The GPU's memory is full: a smaller --batch-size, or fewer beams, needs less; the file goes on with it."
)

Line = Mapping[str, Any]


class CaptionFile:
    """A file of captions, and its provenance beside it.

    The lines of a batch are written together; a line that a kill cut off is dropped when the next run begins.

    Args:
        path: ends in `.jsonl`.

    Raises:
        ConfigError: it does not.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".jsonl":
            raise ConfigError(f"{OPTION}: {path} must end in .jsonl, for it holds a JSON object a line")
        self.path = path
        self.provenance_file = path.with_suffix(".made_from.json")

    def start(self, provenance: Mapping[str, Any], about: Mapping[str, Any], *, retry_failed: bool) -> dict[str, Line]:
        """Begin the file, or go on with it after dropping broken lines; the lines that stay, by image.

        Args:
            provenance: everything that the captions must agree in, plain types.
            about: what is only written down.
            retry_failed: drop the lines of images that could not be read.

        Raises:
            ConfigError: the disk refuses, or the file's provenance is unknown or another one.
        """
        try:
            if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
                raise ConfigError(f"{OPTION}: {self.path} is a pipe or a device; captions go into a file")
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            text = ""
        except OSError as error:
            raise ConfigError(f"{OPTION}: cannot read {self.path}: {error.strerror}") from error
        if not text:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise refused(self.path, error, OPTION) from error
            write_whole(self.provenance_file, as_json({**provenance, "about": about}), OPTION)
            self.add([])
            return {}
        self._require_same(provenance)
        kept = {image: line for image, line in self.lines().items() if not (retry_failed and "error" in line)}
        whole = _as_text(kept.values())
        if whole != text:
            log.info("%s: goes on after %d lines; what was cut off or is tried again is dropped", self.path, len(kept))
            write_whole(self.path, whole, OPTION)
        return kept

    def lines(self) -> dict[str, Line]:
        """The whole lines by image, of several lines of an image the first."""
        found: dict[str, Line] = {}
        for line in JsonLines(self.path).read():
            if isinstance(line.get("image"), str) and ("caption" in line or "error" in line):
                found.setdefault(line["image"], line)
        return found

    def add(self, lines: Iterable[Line]) -> None:
        """Write the lines of a batch, in one write: those of several processes do not mix; ConfigError if the disk
        refuses."""
        text = _as_text(lines).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise refused(self.path, error, OPTION) from error

    def _require_same(self, provenance: Mapping[str, Any]) -> None:
        try:
            before = dict(json.loads(self.provenance_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{OPTION}: {self.path} is there, but {self.provenance_file.name} beside it, which says what it was "
                "made from, cannot be read; choose another file"
            ) from error
        before.pop("about", None)
        changes = list(_changes(before, json.loads(json.dumps(provenance))))
        if changes:
            more = f"; and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
            raise ConfigError(
                f"{OPTION}: {self.path} was made from something else:\n  "
                + "\n  ".join(changes[:SHOWN_CHANGES])
                + f"{more}\nChoose another file, or delete this one to begin again."
            )


def _as_text(lines: Iterable[Line]) -> str:
    return "".join(escaped(json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> Iterator[str]:
    """`decoding.num_beams: 1 then, 5 now` of each value that differs."""
    for name in dict.fromkeys([*before, *now]):
        values = [before.get(name), now.get(name)]
        if all(isinstance(value, dict) for value in values):
            yield from _changes(*values, f"{under}{name}.")
        elif values[0] != values[1]:
            texts = [json.dumps(value, ensure_ascii=False) for value in values]
            cut = [f"{s[:SHOWN_CHARACTERS]} ..." if len(s) > SHOWN_CHARACTERS else s for s in texts]
            yield f"{under}{name}: {cut[0]} then, {cut[1]} now"


@dataclass(frozen=True)
class Counts:
    """How far a file is with the images of a run."""

    captioned: int
    failed: int
    new: int
    """Images of both kinds that were not in the file before."""


@dataclass(frozen=True)
class Captioning:
    """What is captioned, how, and where to."""

    cfg: Config
    """With `model.ckpt`."""

    rules: PromptRules
    base: Path
    """Where the names of the images begin."""

    items: Sequence[ImageFile]
    batch_size: int
    file: CaptionFile
    retry_failed: bool = False

    def run(self, processes: Processes) -> Counts | None:
        """Caption the images that are not in the file yet; every rank must call it. The counts, on rank 0.

        Batches are cut from the missing images in their order. A kill loses whole batches, so what is missing then is
        cut as before, and captions do not depend on kills or on the number of processes.

        Raises:
            MiniGPT4Error: configuration, checkpoint or file are wrong; the text says what.
        """
        missing = processes.broadcast(self._missing() if processes.is_main else None)
        batches = cut(missing, self.batch_size)[processes.rank :: processes.world_size]
        shared_out = sharding(self.cfg.run)
        if batches or (missing and shared_out):
            pipeline = Pipeline(self.cfg, processes.device, **shared_out)
            with uneven_inputs(pipeline.model.llama_model):
                self._caption(pipeline, batches, processes)
        processes.barrier()
        if not processes.is_main:
            return None
        lines = self.file.lines()
        own = [lines[item.name] for item in self.items if item.name in lines]
        failed = sum("error" in line for line in own)
        return Counts(len(own) - failed, failed, new=len(missing))

    def _missing(self) -> list[int]:
        """Numbers of the images without a line."""
        model, path = dataclasses.replace(self.cfg.model, ckpt=None), self.cfg.model.ckpt
        provenance = {
            "checkpoint": file_sha256(find_weights(path, "model.ckpt", Path(path).name)),
            "image_folder": str(self.base),
            **self.rules.provenance(),
            **cached_numbers(self.cfg),
            **image_provenance(self.cfg),
            "model": dataclasses.asdict(model),
            "frozen_files": {name: sample for name, *sample in frozen_files(model)},
        }
        about = {"checkpoint": path, "batch_size": self.batch_size, "versions": versions()}
        done = self.file.start(provenance, about, retry_failed=self.retry_failed)
        return [number for number, item in enumerate(self.items) if item.name not in done]

    def _caption(self, pipeline: Pipeline, batches: Sequence[Sequence[int]], processes: Processes) -> None:
        images = ImageList(self.items, pipeline.processor, feature_cache(self.cfg))
        total = sum(map(len, batches))
        with tqdm(total=total, desc="captions", unit="image", disable=None if processes.is_main else True) as bar:
            read = read_batches(images, batches, self.cfg.run.num_workers)
            for numbers, batch in zip(batches, read, strict=True):
                self.file.add(self._lines(pipeline, numbers, batch))
                bar.update(len(numbers))

    def _lines(self, pipeline: Pipeline, numbers: Sequence[int], batch: ImageBatch) -> list[Line]:
        """The lines of a batch, in its order."""
        for error in batch.errors.values():
            log.warning("%s", error)
        results = {number: {"error": error} for number, error in batch.errors.items()}
        if batch.numbers:
            place = numbers[0] // self.batch_size  # the number of the batch among all, whatever is done already
            try:
                answers = pipeline.answers(batch.pixels, self.rules, batch=place)
            except torch.OutOfMemoryError as error:
                raise RunError(f"{error}\n{OUT_OF_MEMORY}") from error
            results |= {number: {"caption": one.text} for number, one in zip(batch.numbers, answers, strict=True)}
        items = [(number, self.items[number]) for number in numbers]
        return [{"image_id": item.image_id, "image": item.name, **results[number]} for number, item in items]
