"""Answers of checkpoints to prompts about many images: resumable, kept under a content hash, complete on rank 0.

The frozen parts load once, each image is encoded once, and the trained weights are swapped between checkpoints.
Shapes: U different image files of a batch, S pixels a side, Q image tokens, V channels before the projection.
"""

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt4.common.checkpoint import file_sha256, read_card
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError, RunError, SampleError, WeightsError, errors_as
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import versions
from minigpt4.common.utils import JsonLines, escaped, quick_hash
from minigpt4.inference.engine import CheckpointSwitch
from minigpt4.inference.image_list import Images, read_batches
from minigpt4.inference.pipeline import PromptRules, frozen_files, image_provenance
from minigpt4.models.feature_cache import FeatureEncoder, cached_numbers, lazy_vision_argument
from minigpt4.models.fsdp import sharding, uneven_inputs
from minigpt4.models.generation import Answer

log = logging.getLogger(__name__)

CARD_KEYS = (
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
"""What a report repeats of a checkpoint's card; the rest is the configuration of the training."""
MODEL_KEYS = ("arch", "model_type", "llama_model", "llm_precision", "vit_model", "vit_precision", "image_size")
"""What a report repeats of the `model:` section."""
EPOCH = re.compile(r"checkpoint_(\d+)")
FOLDER = "predictions"
SECONDS_BETWEEN_LINES = 60
OUT_OF_MEMORY = "The GPU's memory is full: a smaller run.batch_size_eval, or fewer beams, needs less."


# Checkpoints to evaluate


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint to evaluate."""

    name: str
    """In tables, such as `epoch 3`."""

    path: Path
    sha256: str
    card: dict[str, Any] | None
    """`CARD_KEYS` of the card beside the file; None without a card that fits the file."""

    @property
    def file_name(self) -> str:
        """The name as part of a file name, `epoch_3`."""
        return _file_name(self.name)


@errors_as(ConfigError, "--ckpt")
def read_checkpoint_list(values: Sequence[str]) -> list[NamedCheckpoint]:
    """Checkpoints given as PATH or NAME=PATH, in their order.

    Raises:
        WeightsError: a file does not exist.
        ConfigError: two have the same name.
    """
    with errors_as(WeightsError, "--ckpt"):
        pairs = [_name_and_path(value) for value in values]
        missing = [path for _, path in pairs if not path.is_file()]
    if missing:
        raise WeightsError(f"--ckpt: there is no file {missing[0]}")
    for number, (name, _) in enumerate(pairs):
        same = [other for other, _ in pairs[:number] if _file_name(other) == _file_name(name)]
        if same:
            raise ConfigError(f"--ckpt: {same[0]!r} and {name!r} would share their files; name them: NAME=PATH")
    return [_read_checkpoint(name, path) for name, path in pairs]


def _name_and_path(value: str) -> tuple[str, Path]:
    name, mark, path = value.partition("=")
    if mark and name.strip() and path and not Path(value).is_file():
        return name.strip(), Path(path).expanduser()
    path = Path(value).expanduser()
    epoch = EPOCH.fullmatch(path.stem)
    return (f"epoch {epoch[1]}" if epoch else path.stem), path


def _read_checkpoint(name: str, path: Path) -> NamedCheckpoint:
    with errors_as(WeightsError, f"--ckpt: {path}"):
        digest = file_sha256(path)
    card = read_card(path)
    if card is not None and card["sha256"] != digest:
        log.warning("%s is not the file that its card describes; the report shows no card", path)
        card = None
    return NamedCheckpoint(name, path, digest, card and {key: card[key] for key in CARD_KEYS if key in card})


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


# Answers on disk


class Predictions:
    """Answers of one checkpoint to one prompt, written batch by batch; a killed run resumes from them.

        FOLDER/predictions/<key>/made_from.json   the provenance; its hash is the key
        FOLDER/predictions/<key>/rank<N>.jsonl    {"batch": 7, "captions": {"1009279": "Two men ..."}, "ended": [true]}

    Another provenance has another key, so answers are neither mixed up nor overwritten. A batch is one line: complete,
    or generated again. `ended` says of each answer, in order, whether the model ended it and not the token limit;
    older files lack it.

    Args:
        folder: of the evaluation.
        provenance: everything that the answers depend on, plain types.
        batches: image ids of every batch.
        rank: of this process; each writes a file of its own.

    Attributes:
        done: answers by image id, by number of the batch.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(
        self, folder: Path, provenance: Mapping[str, Any], batches: Sequence[Sequence[str]], rank: int
    ) -> None:
        text = escaped(json.dumps(provenance, indent=1, sort_keys=True, ensure_ascii=False))
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
            self.done |= {r["batch"]: _read_answers(r) for r in JsonLines(file).read() if self._is_batch(r)}

    def add(self, batch: int, answers: Mapping[str, Answer]) -> None:
        """Keep the answers of a batch, by image id."""
        self.done[batch] = dict(answers)
        captions = {image_id: answer.text for image_id, answer in answers.items()}
        self._own.append({"batch": batch, "captions": captions, "ended": [one.ended for one in answers.values()]})

    def _is_batch(self, record: Mapping[str, Any]) -> bool:
        number, captions = record.get("batch"), record.get("captions")
        fits = isinstance(number, int) and 0 <= number < len(self._batches) and isinstance(captions, dict)
        return fits and list(captions) == list(self._batches[number])


def _read_answers(record: Mapping[str, Any]) -> dict[str, Answer]:
    captions, ended = record["captions"], record.get("ended")
    if not isinstance(ended, list) or len(ended) != len(captions):
        ended = [None] * len(captions)
    return {image_id: Answer(text, end) for (image_id, text), end in zip(captions.items(), ended, strict=True)}


# The run


@dataclass(frozen=True)
class PredictionRun:
    """Every prompt about every image, answered by every checkpoint."""

    cfg: Config
    images: Images
    batches: Sequence[Sequence[int]]
    """Numbers of the images that are answered together."""

    prompts: Sequence[PromptRules]
    checkpoints: Sequence[NamedCheckpoint]
    folder: Path
    """Of the evaluation."""

    def answers(self, processes: Processes) -> list[list[dict[str, Answer]]] | None:
        """On rank 0 the answers of each checkpoint to each prompt, by image id in the order of the images.

        Only missing answers are generated. Every rank must call it.

        Raises:
            MiniGPT4Error: an image or a checkpoint is wrong, or the folder cannot be written to.
        """
        stores = self._stores(processes)
        self._generate_missing(stores, processes)
        # Gathered, not read: files of other nodes may be out of reach.
        gathered = processes.gather([store.done for store in stores.values()])
        if gathered is None:
            return None
        complete = {key: self._in_order(rank[index] for rank in gathered) for index, key in enumerate(stores)}
        return [[complete[one.sha256, number] for number in range(len(self.prompts))] for one in self.checkpoints]

    def _in_order(self, parts: Iterable[Mapping[int, Mapping[str, Answer]]]) -> dict[str, Answer]:
        found = {image_id: one for part in parts for batch in part.values() for image_id, one in batch.items()}
        return {item.image_id: found[item.image_id] for item in self.images.items}

    def _stores(self, processes: Processes) -> dict[tuple[str, int], Predictions]:
        """Stored answers by hash of the checkpoint and number of the prompt: equal checkpoints are asked once."""
        ids = [[self.images.items[number].image_id for number in batch] for batch in self.batches]
        provenance = {
            "model": dataclasses.asdict(self.cfg.model),
            "frozen_files": frozen_files(self.cfg.model),
            "images": [[item.image_id, *quick_hash(item.file)] for item in self.images.items],
            "versions": processes.broadcast(versions()),
            "device": processes.device.type,
            "batches": ids,
            **cached_numbers(self.cfg),
            **image_provenance(self.cfg),
        }
        return {
            (sha, number): Predictions(
                self.folder, provenance | rules.provenance() | {"checkpoint": sha}, ids, processes.rank
            )
            for sha in dict.fromkeys(checkpoint.sha256 for checkpoint in self.checkpoints)
            for number, rules in enumerate(self.prompts)
        }

    def _generate_missing(self, stores: Mapping[tuple[str, int], Predictions], processes: Processes) -> None:
        """The model is built only if an answer is missing."""
        missing = self._missing(stores, processes)
        if not any(missing.values()):
            log.info("All answers of %d checkpoints are there; nothing is generated", len(self.checkpoints))
            return
        model_class = registry.get_model_class(self.cfg.model.arch)
        switches = lazy_vision_argument(self.cfg) | sharding(self.cfg.run)
        model = model_class.from_config(self.cfg.model, device=processes.device, **switches).eval()
        switch, loaded = CheckpointSwitch(model), None
        encoded = _EncodedBatches(self, model, keep=len(stores) > 1 and model.vision_is_frozen)
        try:
            with uneven_inputs(model.llama_model):
                for checkpoint, (number, rules) in product(self.checkpoints, enumerate(self.prompts)):
                    store = stores[checkpoint.sha256, number]
                    shared_out = missing[checkpoint.sha256, number][processes.rank :: processes.world_size]
                    wanted = [batch for batch in shared_out if batch not in store.done]
                    if not wanted:
                        log.info("%s: all answers are there", checkpoint.name)
                        continue
                    if loaded is not checkpoint:
                        switch.load(checkpoint.path)
                        loaded = checkpoint
                    self._generate(encoded, rules, checkpoint.name, store, wanted, processes.is_main)
        except torch.OutOfMemoryError as error:
            raise RunError(f"{error}\n{OUT_OF_MEMORY}") from error

    def _missing(
        self, stores: Mapping[tuple[str, int], Predictions], processes: Processes
    ) -> dict[tuple[str, int], list[int]]:
        """Numbers of the batches that no rank has, of each store; the same on every rank, which shares them out."""
        gathered = processes.gather([set(store.done) for store in stores.values()])
        missing = None
        if gathered is not None:
            done = [set().union(*parts) for parts in zip(*gathered, strict=True)]
            missing = [[number for number in range(len(self.batches)) if number not in own] for own in done]
        return dict(zip(stores, processes.broadcast(missing), strict=True))

    @torch.inference_mode()
    def _generate(
        self,
        encoded: "_EncodedBatches",
        rules: PromptRules,
        name: str,
        store: Predictions,
        wanted: Sequence[int],
        show: bool,
    ) -> None:
        """Answers of the loaded checkpoint, called `name`, to one prompt about the images of the batches `wanted`."""
        total, done = sum(len(self.batches[number]) for number in wanted), 0
        start = said = time.monotonic()
        with tqdm(total=total, desc=name, unit="image", disable=None if show else True) as bar:
            for number, embeds_BQD in encoded.embeds(wanted):
                ids = [self.images.items[image].image_id for image in self.batches[number]]
                answers = rules.answers(encoded.model, embeds_BQD, ids, batch=number)
                store.add(number, dict(zip(ids, answers, strict=True)))
                bar.update(len(ids))
                done += len(ids)
                if (now := time.monotonic()) - said > SECONDS_BETWEEN_LINES:
                    log.info("%s: %d of %d images of this process", name, done, total)
                    said = now
        log.info("%s: %d answers in %.1f s on this process", name, total, time.monotonic() - start)


class _EncodedBatches:
    """Image tokens of batches; `keep` the features of the frozen vision part, Q x V numbers a file, for later."""

    def __init__(self, run: PredictionRun, model: Any, *, keep: bool) -> None:
        self.model, self._run, self._keep = model, run, keep
        self._encoder = FeatureEncoder(model)
        self._features: dict[int, Tensor] = {}

    def embeds(self, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Number and image tokens (B, Q, D) of each batch; SampleError for an image that cannot be read."""
        files = {
            number: [self._run.images.items[image].file for image in self._run.batches[number]] for number in wanted
        }
        distinct = {
            number: list(dict.fromkeys(own)) for number, own in files.items()
        }  # encoded once, whatever is asked
        unknown = [
            [self._run.batches[number][files[number].index(file)] for file in distinct[number]]
            for number in wanted
            if number not in self._features
        ]
        images = read_batches(self._run.images, unknown, self._run.cfg.run.num_workers)
        for number in wanted:
            features_UQV = self._features.get(number)
            if features_UQV is None:
                batch = next(images)
                if batch.errors:
                    raise SampleError(next(iter(batch.errors.values())))
                features_UQV = self._encoder.features(batch.pixels)
            if self._keep:
                self._features[number] = features_UQV.cpu()
            embeds_UQD = self.model.project(features_UQV.to(self.model.device))
            yield number, embeds_UQD[[distinct[number].index(file) for file in files[number]]]


# What commands and reports share


def setup_metadata(cfg: Config, rules: PromptRules) -> dict[str, Any]:
    """What is the same for all checkpoints, for the report."""
    model = dataclasses.asdict(cfg.model)
    return {
        **rules.provenance(),
        "batch_size": batch_size(cfg),
        "model": {key: model.get(key) for key in MODEL_KEYS},
        "versions": versions(),
    }


def without_datasets(cfg: Config) -> Config:
    """The config of a command whose images come from an option: no `model.ckpt`, no datasets."""
    return cfg.replace(model=dataclasses.replace(cfg.model, ckpt=None), datasets={})


def batch_size(cfg: Config) -> int:
    """Images that are answered together."""
    return cfg.run.batch_size_eval or cfg.batch_size()
