"""Captions of many images into a file: `scripts/caption.py` in steps."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minigpt4.common.checkpoint import find_weights
from minigpt4.common.distributed import Processes
from minigpt4.common.errors import RunError
from minigpt4.common.experiment import Experiment
from minigpt4.common.run_checkpoints import file_sha256
from minigpt4.common.run_folder import versions
from minigpt4.features.cache import cached_numbers, feature_cache
from minigpt4.inference.caption_file import CaptionFile
from minigpt4.inference.image_batches import ImageBatch, read_batches
from minigpt4.inference.image_list import ImageFile, ImageList, cut
from minigpt4.inference.origin import frozen_files, image_facts
from minigpt4.inference.pipeline import Pipeline
from minigpt4.inference.prompt_rules import PromptRules
from minigpt4.models.lockstep import in_step
from minigpt4.models.sharded_llm import sharding

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "The GPU's memory is full: a smaller --batch-size, or fewer beams, needs less; the file goes on with it."
)


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

    cfg: Experiment
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
        missing = processes.share(self._missing() if processes.is_main else None)
        batches = cut(missing, self.batch_size)[processes.rank :: processes.world_size]
        shared_out = sharding(self.cfg.run)
        if batches or (missing and shared_out):
            pipeline = Pipeline(self.cfg, processes.device, **shared_out)
            with in_step(pipeline.model.llama_model):
                self._caption(pipeline, batches, processes)
        processes.wait()
        return self._counts(len(missing)) if processes.is_main else None

    def _missing(self) -> list[int]:
        """Numbers of the images without a line."""
        done = self.file.start(self._made_from(), self._about(), retry_failed=self.retry_failed)
        return [number for number, item in enumerate(self.items) if item.name not in done]

    def _made_from(self) -> dict[str, Any]:
        model = dataclasses.replace(self.cfg.model, ckpt=None)
        return {
            "checkpoint": file_sha256(self._checkpoint()),
            "image_folder": str(self.base),
            **self.rules.facts(),
            **cached_numbers(self.cfg),
            **image_facts(self.cfg),
            "model": dataclasses.asdict(model),
            "frozen_files": {name: facts for name, *facts in frozen_files(model)},
        }

    def _checkpoint(self) -> Path:
        path = self.cfg.model.ckpt
        return find_weights(path, "model.ckpt", Path(path).name)

    def _about(self) -> dict[str, Any]:
        return {"checkpoint": self.cfg.model.ckpt, "batch_size": self.batch_size, "versions": versions()}

    def _caption(self, pipeline: Pipeline, batches: Sequence[Sequence[int]], processes: Processes) -> None:
        images = ImageList(self.items, pipeline.processor, feature_cache(self.cfg))
        total = sum(map(len, batches))
        with tqdm(total=total, desc="captions", unit="image", disable=None if processes.is_main else True) as bar:
            read = read_batches(images, batches, self.cfg.run.num_workers)
            for numbers, batch in zip(batches, read, strict=True):
                self.file.add(self._lines(pipeline, numbers, batch))
                bar.update(len(numbers))

    def _lines(self, pipeline: Pipeline, numbers: Sequence[int], batch: ImageBatch) -> list[Mapping[str, str]]:
        """The lines of a batch, in its order."""
        for error in batch.errors.values():
            log.warning("%s", error)
        said = {number: {"error": error} for number, error in batch.errors.items()}
        if batch.numbers:
            place = numbers[0] // self.batch_size  # the number of the batch among all, whatever is done already
            answers = self._answers(pipeline, batch, place)
            said |= {number: {"caption": text} for number, text in zip(batch.numbers, answers, strict=True)}
        items = [(number, self.items[number]) for number in numbers]
        return [{"image_id": item.image_id, "image": item.name, **said[number]} for number, item in items]

    def _answers(self, pipeline: Pipeline, batch: ImageBatch, place: int) -> list[str]:
        try:
            return [answer.text for answer in pipeline.answers(batch.pixels, self.rules, batch=place)]
        except torch.OutOfMemoryError as error:
            raise RunError(f"{error}\n{OUT_OF_MEMORY}") from error

    def _counts(self, new: int) -> Counts:
        lines = self.file.lines()
        own = [lines[item.name] for item in self.items if item.name in lines]
        failed = sum("error" in line for line in own)
        return Counts(len(own) - failed, failed, new)
