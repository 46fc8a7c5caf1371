"""Prompts about images, answered by several checkpoints: resumable, shared out over processes, whole on rank 0."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minigpt4.common.distributed import Processes
from minigpt4.common.errors import RunError
from minigpt4.common.experiment import Experiment
from minigpt4.common.file_sample import file_sample
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import versions
from minigpt4.evaluation.answerer import Answerer
from minigpt4.evaluation.checkpoint_list import NamedCheckpoint
from minigpt4.evaluation.predictions import Predictions
from minigpt4.features.cache import cached_numbers, waiting_vision
from minigpt4.inference.image_batches import Images
from minigpt4.inference.origin import frozen_files, image_facts
from minigpt4.inference.prompt_rules import PromptRules
from minigpt4.models.generation import Answer
from minigpt4.models.lockstep import in_step
from minigpt4.models.sharded_llm import sharding

log = logging.getLogger(__name__)

REPORTED_OF_MODEL = ("arch", "model_type", "llama_model", "llm_precision", "vit_model", "vit_precision", "image_size")
SECONDS_BETWEEN_LINES = 60
OUT_OF_MEMORY = "The GPU's memory is full: a smaller run.batch_size_eval, or fewer beams, needs less."


@dataclass(frozen=True)
class Asking:
    """What is asked about which images, and of which checkpoints."""

    cfg: Experiment
    images: Images
    batches: Sequence[Sequence[int]]
    """Numbers of images that are answered together."""

    rules: Sequence[PromptRules]
    """One a prompt."""

    checkpoints: Sequence[NamedCheckpoint]
    folder: Path
    """Of the evaluation."""

    def answers(self, processes: Processes) -> list[list[dict[str, Answer]]] | None:
        """On rank 0 the answers of each checkpoint to each prompt, by image id in the order of the images.

        Makes those that are missing. Every rank must call it.

        Raises:
            MiniGPT4Error: an image or a checkpoint is wrong, or the folder cannot be written to.
        """
        stores = self._stores(processes)
        self._complete(stores, processes)
        flat = [store for own in stores for store in own]
        gathered = processes.gather([store.done for store in flat])  # a rank need not see the files of another node
        if gathered is None:
            return None
        whole = iter([self._in_order([rank[index] for rank in gathered]) for index in range(len(flat))])
        return [[next(whole) for _ in own] for own in stores]

    def _in_order(self, parts: Sequence[Mapping[int, Mapping[str, Answer]]]) -> dict[str, Answer]:
        everyone = {image_id: one for part in parts for batch in part.values() for image_id, one in batch.items()}
        return {item.image_id: everyone[item.image_id] for item in self.images.items}

    # What answers are made from

    def _stores(self, processes: Processes) -> list[list[Predictions]]:
        """The answers of each checkpoint to each prompt, as far as they are there."""
        ids = [[self.images.items[number].image_id for number in batch] for batch in self.batches]
        common = self._made_from(processes) | {"batches": ids}
        hashes = [checkpoint.sha256 for checkpoint in self.checkpoints]
        by_hash = {
            sha: [
                Predictions(self.folder, common | rules.facts() | {"checkpoint": sha}, ids, processes.rank)
                for rules in self.rules
            ]
            for sha in dict.fromkeys(hashes)
        }
        return [by_hash[sha] for sha in hashes]

    def _made_from(self, processes: Processes) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.cfg.model),
            "frozen_files": frozen_files(self.cfg.model),
            "images": [[item.image_id, *file_sample(item.file)] for item in self.images.items],
            "versions": processes.share(versions()),
            "device": processes.device.type,
            **cached_numbers(self.cfg),
            **image_facts(self.cfg),
        }

    # Making them

    def _complete(self, stores: Sequence[Sequence[Predictions]], processes: Processes) -> None:
        """Make the answers that are missing; the model is built only if there are any."""
        flat = [store for own in stores for store in own]
        missing = iter(self._missing(flat, processes))
        wanted = [[next(missing) for _ in own] for own in stores]
        if not any(numbers for own in wanted for numbers in own):
            log.info("All answers of %d checkpoints are there; nothing is generated", len(stores))
            return
        model_class = registry.get_model_class(self.cfg.model.arch)
        switches = waiting_vision(self.cfg) | sharding(self.cfg.run)
        model = model_class.from_config(self.cfg.model, device=processes.device, **switches).eval()
        answerer = Answerer(
            model,
            self.images,
            self.batches,
            keep_features=len(flat) > 1,
            num_workers=self.cfg.run.num_workers,
        )
        try:
            with in_step(model.llama_model):
                for checkpoint, own, numbers in zip(self.checkpoints, stores, wanted, strict=True):
                    self._ask(answerer, checkpoint, own, numbers, processes)
        except torch.OutOfMemoryError as error:
            raise RunError(f"{error}\n{OUT_OF_MEMORY}") from error

    def _missing(self, stores: Sequence[Predictions], processes: Processes) -> list[list[int]]:
        """Numbers of the batches that no rank has, of each store; the same on every rank, which shares them out."""
        gathered = processes.gather([list(store.done) for store in stores])
        missing = None
        if gathered is not None:
            found = [set().union(*(rank[index] for rank in gathered)) for index in range(len(stores))]
            missing = [[number for number in range(len(self.batches)) if number not in done] for done in found]
        return processes.share(missing)

    def _ask(
        self,
        answerer: Answerer,
        checkpoint: NamedCheckpoint,
        stores: Sequence[Predictions],
        missing: Sequence[Sequence[int]],
        processes: Processes,
    ) -> None:
        """The missing answers of one checkpoint."""
        is_loaded = False
        for rules, store, numbers in zip(self.rules, stores, missing, strict=True):
            own = [number for number in numbers[processes.rank :: processes.world_size] if number not in store.done]
            if not own:
                log.info("%s: all answers are there", checkpoint.name)
                continue
            if not is_loaded:
                answerer.load(checkpoint.path)
                is_loaded = True
            self._answer(answerer, rules, checkpoint.name, store, own, processes.is_main)

    def _answer(
        self,
        answerer: Answerer,
        rules: PromptRules,
        name: str,
        store: Predictions,
        wanted: Sequence[int],
        show: bool,
    ) -> None:
        """The answers of the loaded checkpoint to one prompt, batch by batch."""
        items = self.images.items
        total = sum(len(self.batches[number]) for number in wanted)
        start = said = time.monotonic()
        with tqdm(total=total, desc=name, unit="image", disable=None if show else True) as bar:
            done = 0
            for number, answers in answerer.answers(rules, wanted):
                ids = [items[place].image_id for place in self.batches[number]]
                store.add(number, dict(zip(ids, answers, strict=True)))
                bar.update(len(ids))
                done += len(ids)
                if (now := time.monotonic()) - said > SECONDS_BETWEEN_LINES:
                    log.info("%s: %d of %d images of this process", name, done, total)
                    said = now
        log.info("%s: %d answers in %.1f s on this process", name, total, time.monotonic() - start)


def setup_facts(cfg: Experiment, rules: PromptRules) -> dict[str, Any]:
    """What is the same for all checkpoints, for the report."""
    model = dataclasses.asdict(cfg.model)
    return {
        **rules.facts(),
        "batch_size": batch_size(cfg),
        "model": {key: model.get(key) for key in REPORTED_OF_MODEL},
        "versions": versions(),
    }


def without_datasets(cfg: Experiment) -> Experiment:
    """The experiment of a command whose images come by an option: no `model.ckpt`, no datasets."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, ckpt=None), datasets={})


def batch_size(cfg: Experiment) -> int:
    """Images that are answered together."""
    return cfg.run.batch_size_eval or cfg.batch_size()
