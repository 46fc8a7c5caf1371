"""Answers about many images: generated batch by batch, and kept as JSON lines from which a stopped run resumes.

captions.jsonl                        {"image_id": "1", "image": "1.jpg", "caption": "Two men ..."}
                                      {"image_id": "2", "image": "2.jpg", "error": "...: not an image"}
captions.made_from.json               provenance: checkpoint, prompt, decoding, model
predictions/<hash>/rank<N>.jsonl      the same of an evaluation, whose lines say whether the model ended its answer
predictions/<hash>/made_from.json     the provenance that was hashed

Shapes: B images of a batch, U different files of them, Q image tokens, V channels before the projection, D after it.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt4.common.checkpoint import file_sha256, find_weights
from minigpt4.common.config import Config
from minigpt4.common.devices import memory_advice
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.run_folder import versions
from minigpt4.common.utils import JsonLines, as_json, escaped, json_line, refused, write_whole
from minigpt4.datasets.datasets.dataloader_utils import to_device
from minigpt4.inference.image_list import ImageFile, ImageList, cut, read_batches
from minigpt4.inference.pipeline import PromptRules, frozen_files, image_provenance, image_reader
from minigpt4.models.feature_cache import FeatureEncoder, build_model
from minigpt4.models.fsdp import sharding, uneven_inputs
from minigpt4.models.loading import CheckpointSwitch

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60
OUT_OF_MEMORY = "The GPU's memory is full: a smaller batch, or fewer beams, needs less; the same command resumes."

Line = Mapping[str, Any]


# Answers on disk


@dataclass(frozen=True)
class AnswerStore:
    """Answers about images in a file of JSON lines, with their provenance in a file beside it.

    The lines of a batch are one write, so those of several processes do not mix. Reading skips a line that a kill cut
    off, and takes of several lines of an image the first.
    """

    path: Path
    provenance_file: Path
    key: str
    """Field that tells images apart."""
    fields: tuple[str, ...]
    """What is written of a line."""
    option: str
    """Of the command line, for errors."""

    @classmethod
    def captions(cls, path: Path) -> Self:
        """The file of `scripts/caption.py`, which all processes write; ConfigError unless it ends in `.jsonl`."""
        if path.suffix.lower() != ".jsonl":
            raise ConfigError(f"--output: {path} must end in .jsonl, for it holds a JSON object a line")
        fields = ("image_id", "image", "caption", "error")
        return cls(path, path.with_suffix(".made_from.json"), "image", fields, "--output")

    @classmethod
    def predictions(cls, folder: Path, provenance: Mapping[str, Any], rank: int) -> Self:
        """A process's file in the folder of an evaluation, another one for another provenance; ConfigError if the
        folder cannot be written to."""
        text = escaped(json.dumps(provenance, indent=1, sort_keys=True, ensure_ascii=False))
        own = folder / "predictions" / hashlib.sha256(text.encode()).hexdigest()[:16]
        fields = ("image_id", "caption", "ended")
        store = cls(own / f"rank{rank}.jsonl", own / "made_from.json", "image_id", fields, "--save_path")
        store._make_folder()
        if rank == 0:
            write_whole(store.provenance_file, text + "\n")
        store.keep()
        return store

    def start(self, provenance: Mapping[str, Any], about: Mapping[str, Any], *, retry_failed: bool) -> dict[str, Line]:
        """Begin the file, or go on with it; the lines that stay, by image.

        `provenance`: what the captions must agree in; `about`: what is only written down; `retry_failed`: drop lines of
        images that could not be read. ConfigError if the disk refuses, or the file's provenance is another one.
        """
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(f"{self.option}: {self.path} is a folder, a pipe or a device; captions go into a file")
        if self.path.exists() and self.path.stat().st_size:
            self._require_same(provenance)
            return self.keep(without_errors=retry_failed)
        self._make_folder()
        write_whole(self.provenance_file, as_json({**provenance, "about": about}), self.option)
        self.add([])
        return {}

    def keep(self, *, without_errors: bool = False) -> dict[str, Line]:
        """Drop from the file what is cut off, comes twice or, if so asked, is an error; the lines that stay."""
        kept = {image: line for image, line in self.lines().items() if not (without_errors and "error" in line)}
        whole = "".join(map(json_line, kept.values()))
        if self.path.exists() and whole.encode() != self.path.read_bytes():
            log.info("%s: goes on after %d lines; what was cut off or is tried again is dropped", self.path, len(kept))
            write_whole(self.path, whole, self.option)
        return kept

    def lines(self, pattern: str = "") -> dict[str, Line]:
        """The whole lines by image; of all files in the folder that fit a pattern."""
        found: dict[str, Line] = {}
        for path in sorted(self.path.parent.glob(pattern)) if pattern else [self.path]:
            for line in JsonLines(path).read():
                if isinstance(line.get(self.key), str) and ("caption" in line or "error" in line):
                    found.setdefault(line[self.key], line)
        return found

    def add(self, lines: Iterable[Line]) -> None:
        """Write the lines of a batch; ConfigError if the disk refuses."""
        own = [{name: line[name] for name in self.fields if name in line} for line in lines]
        text = "".join(map(json_line, own)).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise refused(self.path, error, self.option) from error

    def _make_folder(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(self.path, error, self.option) from error

    def _require_same(self, provenance: Mapping[str, Any]) -> None:
        unknown = f"{self.option}: what {self.path} was made from, {self.provenance_file.name}, cannot be read"
        with errors_as(ConfigError, f"{unknown}; choose another file"):
            before = dict(json.loads(self.provenance_file.read_text(encoding="utf-8")))
        before.pop("about", None)
        now = json.loads(json.dumps(provenance))
        if changes := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            what = f"another {', another '.join(changes)} ({self.provenance_file.name})"
            way_out = "choose another file, or delete this one to begin again"
            raise ConfigError(f"{self.option}: {self.path} was made with {what}; {way_out}")


# Generating


@dataclass(frozen=True)
class Job:
    """One prompt to one checkpoint."""

    name: str
    checkpoint: Path | None
    """None: what came with a whole LLaVA."""

    rules: PromptRules
    store: AnswerStore
    missing: Sequence[int]
    """Numbers of the batches that no process has; the same on every rank, which shares them out."""


def generate(
    cfg: Config,
    images: ImageList,
    batches: Mapping[int, Sequence[int]],
    jobs: Sequence[Job],
    processes: Processes,
    *,
    keep_errors: bool = False,
) -> None:
    """Answer what is missing; every rank must call it. MiniGPT4Error if something is wrong, or the memory is full.

    The frozen parts load once, each image is encoded once, and the trained weights are swapped between checkpoints.
    `batches`: images that are answered together, by the number of the batch, which seeds sampling. `keep_errors`: an
    image that cannot be read gets a line with its error; else it is a SampleError.
    """
    shares = [job.missing[processes.rank :: processes.world_size] for job in jobs]
    is_sharded = sharding(cfg.run)
    if not any(shares) and not (is_sharded and any(job.missing for job in jobs)):
        return
    start = cfg.replace(model=dataclasses.replace(cfg.model, ckpt=None))
    model = build_model(start, processes.device, **is_sharded).eval()
    switch, loaded = CheckpointSwitch(model), None
    known = {} if len(jobs) > 1 and model.vision_is_frozen else None
    with memory_advice(OUT_OF_MEMORY), uneven_inputs(model.llama_model):
        for job, share in zip(jobs, shares, strict=True):
            if share and job.checkpoint is not None and loaded != job.checkpoint:
                switch.load(job.checkpoint)
                loaded = job.checkpoint
            own = {number: batches[number] for number in share}
            encoded = _encoded(model, images, own, known, cfg.run.num_workers, keep_errors)
            _answer(model, job, encoded, sum(map(len, own.values())), show=processes.is_main)


@torch.inference_mode()
def _answer(model: Any, job: Job, encoded: Iterable[tuple], total: int, *, show: bool) -> None:
    """Answers of the loaded checkpoint about the batches of this process."""
    done, start = 0, time.monotonic()
    logged = start
    with tqdm(total=total, desc=job.name, unit="image", disable=None if show else True) as bar:
        for number, items, embeds_BQD, errors in encoded:
            ids = [item.image_id for item in items if item.file not in errors]
            answers = iter(job.rules.answers(model, embeds_BQD, ids, batch=number) if ids else [])
            lines = []
            for item in items:
                error = errors.get(item.file)
                said = {"error": error} if error else {"caption": (a := next(answers)).text, "ended": a.ended}
                lines.append({"image_id": item.image_id, "image": item.name, **said})
            job.store.add(lines)
            bar.update(len(items))
            done += len(items)
            if (now := time.monotonic()) - logged > SECONDS_BETWEEN_LINES:
                log.info("%s: %d of %d images of this process", job.name, done, total)
                logged = now
    if total:
        log.info("%s: %d answers in %.1f s on this process", job.name, total, time.monotonic() - start)


def _encoded(
    model: Any,
    images: ImageList,
    batches: Mapping[int, Sequence[int]],
    known: dict[int, Tensor] | None,
    num_workers: int,
    keep_errors: bool,
) -> Iterator[tuple[int, list[ImageFile], Tensor | None, dict[Path, str]]]:
    """Number, images, tokens (B, Q, D) of those that can be read (None: of none) and errors of the others by file, of
    each batch.

    `known` keeps the features of the frozen vision part, U x Q x V, for later; None: there is no later.
    """
    encoder = FeatureEncoder(model)
    # Images with one file are encoded once.
    files = {
        number: {file: image for image in batch if (file := images.items[image].file)}
        for number, batch in batches.items()
    }
    unknown = [list(own.values()) for number, own in files.items() if number not in (known or {})]
    read = read_batches(images, unknown, num_workers)
    for number in batches:
        own, rows = [images.items[image] for image in batches[number]], list(files[number])
        errors: dict[Path, str] = {}
        if known and number in known:
            features_UQV = known[number]
        else:
            batch, faults = next(read)
            errors = {images.items[image].file: error for image, error in faults.items()}
            for error in errors.values():
                if not keep_errors:
                    raise SampleError(error)
                log.warning("%s", error)
            rows = [file for file in rows if file not in errors]
            if not rows:
                yield number, own, None, errors
                continue
            features_UQV = encoder.features(to_device({"image": batch}, model.device)["image"])
            if known is not None:
                known[number] = features_UQV.cpu()
        embeds_UQD = model.project(features_UQV.to(model.device))
        yield number, own, embeds_UQD[[rows.index(item.file) for item in own if item.file in rows]], errors


# Captions of a folder or a list


def caption_images(
    cfg: Config,
    rules: PromptRules,
    base: Path,
    items: Sequence[ImageFile],
    batch_size: int,
    store: AnswerStore,
    processes: Processes,
    *,
    retry_failed: bool = False,
) -> tuple[int, int, int] | None:
    """Caption the images that are not in the store yet by `model.ckpt`, or a whole LLaVA; every rank must call it. On
    rank 0 how many images have a caption, how many an error, and how many of both are new.

    Batches are cut from the missing images in their order. A kill loses whole batches, so what is missing then is
    cut as before, and captions do not depend on kills or on the number of processes. `base`: where the names of the
    images begin; `retry_failed`: try images again that could not be read.
    """
    provenance, about = caption_provenance(cfg, rules, base) if processes.is_main else ({}, {})
    about |= {"batch_size": batch_size, "versions": versions()}
    new = answer_missing(
        cfg, rules, items, batch_size, store, processes, provenance, about, name="captions", retry_failed=retry_failed
    )
    if not processes.is_main:
        return None
    lines = store.lines()
    own = [lines[item.name] for item in items if item.name in lines]
    failed = sum("error" in line for line in own)
    return len(own) - failed, failed, new


def caption_provenance(cfg: Config, rules: PromptRules, base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What captions depend on, and what is only written down about it."""
    model, path = dataclasses.replace(cfg.model, ckpt=None), cfg.model.ckpt
    provenance = {
        "checkpoint": path and file_sha256(find_weights(path, "model.ckpt", Path(path).name)),
        "image_folder": str(base),
        **rules.provenance(),
        **image_provenance(cfg),
        "model": dataclasses.asdict(model),
        "frozen_files": {name: sample for name, *sample in frozen_files(model)},
    }
    return provenance, {"checkpoint": path}


def answer_missing(
    cfg: Config,
    rules: PromptRules,
    items: Sequence[ImageFile],
    batch_size: int,
    store: AnswerStore,
    processes: Processes,
    provenance: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    name: str,
    retry_failed: bool = False,
) -> int:
    """Answer, by `model.ckpt` or a whole LLaVA, what is not in the store; how many that were. Every rank must call it.

    `provenance` and `about`, of rank 0: as of `AnswerStore.start`; batches: as of `caption_images`.
    """
    missing = None
    if processes.is_main:
        done = store.start(provenance, about, retry_failed=retry_failed)
        missing = [number for number, item in enumerate(items) if item.name not in done]
    missing = processes.broadcast(missing)
    # By the batch's number among all, whatever is done already.
    batches = {numbers[0] // batch_size: numbers for numbers in cut(missing, batch_size)}
    job = Job(name, Path(cfg.model.ckpt) if cfg.model.ckpt else None, rules, store, list(batches))
    generate(cfg, ImageList(items, image_reader(cfg)), batches, [job], processes, keep_errors=True)
    processes.barrier()
    return len(missing)
