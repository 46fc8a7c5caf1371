"""Prompts about images, answered by several checkpoints: resumable, shared out over processes, whole on rank 0."""

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minigpt4.common.checkpoint import file_sha256, read_card
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError, RunError, SampleError, WeightsError, errors_as
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import versions
from minigpt4.common.text import escaped
from minigpt4.common.utils import JsonLines, quick_hash
from minigpt4.datasets.feature_store import CachedBatch
from minigpt4.inference.engine import CheckpointSwitch
from minigpt4.inference.image_list import ImageItem, Images, read_batches
from minigpt4.inference.pipeline import PromptRules, frozen_files, image_provenance
from minigpt4.models.feature_cache import FeatureEncoder, cached_numbers, lazy_vision_argument
from minigpt4.models.fsdp import sharding, uneven_inputs
from minigpt4.models.generation import Answer

log = logging.getLogger(__name__)


# The checkpoints of an evaluation: what they are called, which files they are, and what their cards say.


EPOCH = re.compile(r"checkpoint_(\d+)")
CARD_FACTS = (
    "arch",
    "model_type",
    "llm",
    "llm_fingerprint",
    "vision",
    "vision_fingerprints",
    "epoch",
    "iteration",
    "valid_loss",
    "job_name",
    "run_started",
    "trained",
    "versions",
)
"""What a report repeats of a card; the rest is the configuration of the training."""


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint to evaluate."""

    name: str
    """In tables, such as `epoch 3`."""

    path: Path
    sha256: str
    card: dict[str, Any] | None
    """Facts of the card beside the file; None without one that fits the file."""

    @property
    def file_name(self) -> str:
        """The name as part of a file name, `epoch_3`."""
        return _file_name(self.name)


@errors_as(ConfigError, "--ckpt")
def read_checkpoint_list(values: Sequence[str]) -> list[NamedCheckpoint]:
    """Checkpoints given as PATH or NAME=PATH, in their order.

    Raises:
        WeightsError: a file is not there.
        ConfigError: two have the same name.
    """
    with errors_as(WeightsError, "--ckpt"):
        pairs = [_name_and_path(value) for value in values]
        lost = [path for _, path in pairs if not path.is_file()]
    if lost:
        raise WeightsError(f"--ckpt: there is no file {lost[0]}")
    for number, (name, _) in enumerate(pairs):
        same = [other for other, _ in pairs[:number] if _file_name(other) == _file_name(name)]
        if same:
            raise ConfigError(f"--ckpt: {same[0]!r} and {name!r} would share their files; name them: NAME=PATH")
    return [_read(name, path) for name, path in pairs]


def _name_and_path(value: str) -> tuple[str, Path]:
    name, mark, path = value.partition("=")
    if mark and name.strip() and path and not Path(value).is_file():
        return name.strip(), Path(path).expanduser()
    path = Path(value).expanduser()
    epoch = EPOCH.fullmatch(path.stem)
    return (f"epoch {epoch[1]}" if epoch else path.stem), path


def _read(name: str, path: Path) -> NamedCheckpoint:
    with errors_as(WeightsError, f"--ckpt: {path}"):
        digest = file_sha256(path)
    card = read_card(path)
    if card is not None and card["sha256"] != digest:
        log.warning("%s is not the file that its card describes; the report shows no card", path)
        card = None
    facts = None if card is None else {key: card[key] for key in CARD_FACTS if key in card}
    return NamedCheckpoint(name, path, digest, facts)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


# Captions on disk, written batch by batch, so that a killed evaluation goes on with what is there.
#
#     DIR/predictions/<key>/made_from.json   what the captions were made from; the key is its hash
#     DIR/predictions/<key>/rank<N>.jsonl    {"batch": 7, "captions": {"1000092795": "Two men ..."}, "ended": [true]}
#
# Captions made in another way have another key, so they are neither mixed up nor overwritten. A batch is one line: it
# is there as a whole or made again. `ended` says of each caption, in their order, whether the model ended it itself
# and not the token limit; older files lack it.


FOLDER = "predictions"


class Predictions:
    """Captions of one checkpoint.

    Args:
        folder: of the evaluation.
        made_from: everything that the captions depend on, plain types.
        batches: image ids of every batch.
        rank: of this process; each writes a file of its own.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any], batches: Sequence[Sequence[str]], rank: int) -> None:
        text = escaped(json.dumps(made_from, indent=1, sort_keys=True, ensure_ascii=False))
        self.folder = folder / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._batches = batches
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                (self.folder / "made_from.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--save_path: cannot write to {self.folder}: {error.strerror}") from error
        self._own = JsonLines(self.folder / f"rank{rank}.jsonl")
        self._own.keep(self._is_batch)
        self.done: dict[int, dict[str, Answer]] = {}
        for file in sorted(self.folder.glob("rank*.jsonl")):
            self.done |= {r["batch"]: _answers(r) for r in JsonLines(file).read() if self._is_batch(r)}

    def add(self, batch: int, answers: Mapping[str, Answer]) -> None:
        """Keep the captions of a batch, by image id."""
        self.done[batch] = dict(answers)
        captions = {image_id: answer.text for image_id, answer in answers.items()}
        self._own.append({"batch": batch, "captions": captions, "ended": [one.ended for one in answers.values()]})

    def _is_batch(self, record: Mapping[str, Any]) -> bool:
        number, captions = record.get("batch"), record.get("captions")
        fits = isinstance(number, int) and 0 <= number < len(self._batches) and isinstance(captions, dict)
        return fits and list(captions) == list(self._batches[number])


def _answers(record: Mapping[str, Any]) -> dict[str, Answer]:
    captions, ended = record["captions"], record.get("ended")
    if not isinstance(ended, list) or len(ended) != len(captions):
        ended = [None] * len(captions)
    return {image_id: Answer(text, end) for (image_id, text), end in zip(captions.items(), ended, strict=True)}


# From checkpoints to answers: frozen parts load once, each image is encoded once, projections are swapped.
#
# Shapes: B images of U different files, S pixels a side, Q image tokens, V channels before the projection.


class Answerer:
    """Answers about batches of images, with one checkpoint after the other.

    Args:
        model: a `MiniGPT4` on its device, in eval mode.
        keep_features: keep what the frozen vision part gives, for the checkpoints to come; Q x V numbers an image.
        num_workers: processes that read images; 0: none but this one.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Images,
        batches: Sequence[Sequence[int]],
        *,
        keep_features: bool,
        num_workers: int,
    ) -> None:
        self.model, self.data, self.batches = model, data, batches
        self._num_workers = num_workers
        self._features: dict[int, Tensor] = {}
        self._keep = keep_features and model.vision_is_frozen
        self._switch = CheckpointSwitch(model)
        self._filler = FeatureEncoder(model)

    def load(self, checkpoint: Path) -> None:
        """Take the trained weights of a checkpoint; WeightsError if they do not fit."""
        self._switch.load(checkpoint)

    @torch.inference_mode()
    def answers(self, rules: PromptRules, wanted: Sequence[int]) -> Iterator[tuple[int, list[Answer]]]:
        """Number of each batch of `wanted`, and its answers in the order of its images.

        Raises SampleError for an image that cannot be read.
        """
        for number, features_UQV in self._batch_features(wanted):
            batch = [self.data.items[place] for place in self.batches[number]]
            embeds_BQD = self.model.project(features_UQV.to(self.model.device))[_places(batch)]
            yield number, rules.answers(self.model, embeds_BQD, [item.image_id for item in batch], batch=number)

    def _batch_features(self, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """What the projection reads of the different files of each batch, (U, Q, V)."""
        unknown = [number for number in wanted if number not in self._features]
        images = iter(self._images(unknown))
        for number in wanted:
            if number in self._features:
                yield number, self._features[number]
                continue
            features_UQV = self._filler.features(next(images))
            if self._keep:
                self._features[number] = features_UQV.cpu()
            yield number, features_UQV

    def _images(self, wanted: Sequence[int]) -> Iterator[Tensor | CachedBatch]:
        """The different files of each batch, as pixels (U, 3, S, S) or rows of a cache."""
        batches = [_firsts(self.data.items, self.batches[number]) for number in wanted]
        for batch in read_batches(self.data, batches, self._num_workers):
            if batch.errors:
                raise SampleError(next(iter(batch.errors.values())))
            yield batch.pixels


def _firsts(items: Sequence[ImageItem], batch: Sequence[int]) -> list[int]:
    """The numbers of a batch without those whose file came before: an image is encoded once, whatever is asked."""
    firsts: dict[Path, int] = {}
    for number in batch:
        firsts.setdefault(items[number].file, number)
    return list(firsts.values())


def _places(batch: Sequence[ImageItem]) -> list[int]:
    """The place of each image's file among the different files of its batch."""
    places: dict[Path, int] = {}
    return [places.setdefault(item.file, len(places)) for item in batch]


REPORTED_OF_MODEL = ("arch", "model_type", "llama_model", "llm_precision", "vit_model", "vit_precision", "image_size")
SECONDS_BETWEEN_LINES = 60
OUT_OF_MEMORY = "The GPU's memory is full: a smaller run.batch_size_eval, or fewer beams, needs less."


@dataclass(frozen=True)
class Asking:
    """What is asked about which images, and of which checkpoints."""

    cfg: Config
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
                Predictions(self.folder, common | rules.provenance() | {"checkpoint": sha}, ids, processes.rank)
                for rules in self.rules
            ]
            for sha in dict.fromkeys(hashes)
        }
        return [by_hash[sha] for sha in hashes]

    def _made_from(self, processes: Processes) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.cfg.model),
            "frozen_files": frozen_files(self.cfg.model),
            "images": [[item.image_id, *quick_hash(item.file)] for item in self.images.items],
            "versions": processes.broadcast(versions()),
            "device": processes.device.type,
            **cached_numbers(self.cfg),
            **image_provenance(self.cfg),
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
        switches = lazy_vision_argument(self.cfg) | sharding(self.cfg.run)
        model = model_class.from_config(self.cfg.model, device=processes.device, **switches).eval()
        answerer = Answerer(
            model,
            self.images,
            self.batches,
            keep_features=len(flat) > 1,
            num_workers=self.cfg.run.num_workers,
        )
        try:
            with uneven_inputs(model.llama_model):
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
        return processes.broadcast(missing)

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


def setup_facts(cfg: Config, rules: PromptRules) -> dict[str, Any]:
    """What is the same for all checkpoints, for the report."""
    model = dataclasses.asdict(cfg.model)
    return {
        **rules.provenance(),
        "batch_size": batch_size(cfg),
        "model": {key: model.get(key) for key in REPORTED_OF_MODEL},
        "versions": versions(),
    }


def without_datasets(cfg: Config) -> Config:
    """The experiment of a command whose images come by an option: no `model.ckpt`, no datasets."""
    return cfg.replace(model=dataclasses.replace(cfg.model, ckpt=None), datasets={})


def batch_size(cfg: Config) -> int:
    """Images that are answered together."""
    return cfg.run.batch_size_eval or cfg.batch_size()
