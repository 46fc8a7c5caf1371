"""Answers of checkpoints to prompts about many images: resumable, kept under a content hash, complete on rank 0."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.checkpoint import file_sha256, read_card, require_file
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError, WeightsError, errors_as
from minigpt4.common.hub import local_path
from minigpt4.common.run_folder import versions
from minigpt4.common.utils import quick_hash
from minigpt4.inference.captioning import AnswerStore, Job, generate
from minigpt4.inference.image_list import ImageList
from minigpt4.inference.pipeline import BATCH_SIZE, PromptRules, frozen_files, image_provenance
from minigpt4.models.generation import Answer
from minigpt4.models.llava_weights import whole_file

log = logging.getLogger(__name__)

CARD_KEYS = ("arch", "model_type", "llm", "llm_fingerprint", "vision", "vision_fingerprints", "epoch", "iteration")
CARD_KEYS += ("valid_loss", "job_name", "run_started", "trained", "versions")
"""What a report repeats of a checkpoint's card; the rest is the configuration of the training."""
MODEL_KEYS = ("arch", "model_type", "llama_model", "llm_precision", "vit_model", "vit_precision", "image_size")
"""What a report repeats of the `model:` section."""
EPOCH = re.compile(r"checkpoint_(\d+)")


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
    def identity(self) -> dict[str, str]:
        """Which checkpoint it is, for reports."""
        return {"name": self.name, "file": str(self.path), "sha256": self.sha256}

    @property
    def file_name(self) -> str:
        """The name as part of a file name, `epoch_3`."""
        return file_name(self.name)


class EvaluationRun(NamedTuple):
    """What a command evaluates, the folder of its results, and the processes that do it."""

    cfg: Config
    checkpoints: Sequence[NamedCheckpoint]
    folder: Path
    processes: Processes


def file_name(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)


def whole_checkpoint(cfg: Config) -> list[str]:
    """The whole LLaVA that `model.llama_model` is, as `read_checkpoint_list` takes it; ConfigError for an LLM alone."""
    file = whole_file(cfg.model)
    if file is None:
        raise ConfigError("--ckpt: is missing, and model.llama_model is no whole LLaVA, which needs none")
    return [f"{file.parent.name}={file}"]


def read_checkpoint_list(values: Sequence[str]) -> list[NamedCheckpoint]:
    """Checkpoints given as PATH or NAME=PATH, in their order; `checkpoint_3.pth` is called `epoch 3`. A path is also a
    file on the hub, `hf:owner/name/checkpoint_3.pth`.

    WeightsError for a file that does not exist or cannot be read, ConfigError where two have the same name.
    """
    found: list[NamedCheckpoint] = []
    for value in values:
        with errors_as(WeightsError, f"--ckpt: {value}"):
            name, mark, path = value.partition("=")
            if not (mark and name.strip() and path and not Path(value).is_file()):
                epoch = EPOCH.fullmatch(Path(value).stem)
                name, path = f"epoch {epoch[1]}" if epoch else Path(value).stem, value
            file = local_path(path, "--ckpt") if path.startswith(("hf:", "https:")) else Path(path).expanduser()
            require_file(file, "--ckpt")
            digest, card = file_sha256(file), read_card(file)
        if card is not None and card["sha256"] != digest:
            log.warning("%s is not the file that its card describes; the report shows no card", file)
            card = None
        own = card and {key: card[key] for key in CARD_KEYS if key in card}
        one = NamedCheckpoint(name.strip(), file, digest, own)
        same = [other.name for other in found if other.file_name == one.file_name]
        if same:
            raise ConfigError(f"--ckpt: {same[0]!r} and {one.name!r} would share their files; name them: NAME=PATH")
        found.append(one)
    return found


# The run


def predict(
    run: EvaluationRun, images: ImageList, prompts: Sequence[PromptRules]
) -> list[list[dict[str, Answer]]] | None:
    """On rank 0 the answers of each checkpoint to each prompt, by image id in the order of the images.

    Only missing answers are generated, whole batches at a time, and kept in the folder. Every rank must call it.
    MiniGPT4Error where an image or a checkpoint is wrong, or the folder cannot be written to.
    """
    cfg, checkpoints, folder, processes = run
    for rules in prompts:
        log.info("%d answers to %r; stop %s; %s", len(images), rules.prompt, rules.stop, rules.decoding)
    batches = images.batches(batch_size(cfg))
    ids = [[images.items[number].image_id for number in batch] for batch in batches]
    provenance = {
        "model": dataclasses.asdict(cfg.model),
        "frozen_files": frozen_files(cfg.model),
        "images": [[item.image_id, *(quick_hash(item.file) if item.file else ())] for item in images.items],
        "versions": processes.broadcast(versions()),
        "device": processes.device.type,
        "batches": None if cfg.run.batch_invariant else ids,
        **image_provenance(cfg),
    }
    jobs: dict[tuple[str, int], Job] = {}  # equal checkpoints are asked once
    for one, (number, rules) in product(checkpoints, enumerate(prompts)):
        if (one.sha256, number) not in jobs:
            own = provenance | rules.provenance() | {"checkpoint": one.sha256}
            store = AnswerStore.predictions(folder, own, processes.rank)
            lines = store.lines("rank*.jsonl")
            done = processes.gather([all(image in lines for image in batch) for batch in ids])
            missing = done and [batch for batch in range(len(ids)) if not any(rank[batch] for rank in done)]
            jobs[one.sha256, number] = Job(one.name, one.path, rules, store, processes.broadcast(missing))
    if not any(job.missing for job in jobs.values()):
        log.info("All answers of %d checkpoints are there; nothing is generated", len(checkpoints))
    generate(cfg, images, dict(enumerate(batches)), list(jobs.values()), processes)
    # Gathered, not read: files of other nodes may be out of reach.
    gathered = processes.gather({key: job.store.lines("rank*.jsonl") for key, job in jobs.items()})
    if gathered is None:
        return None
    answers = {}
    for key in jobs:
        lines = {image: line for rank in gathered for image, line in rank[key].items()}
        own = {item.image_id: lines[item.image_id] for item in images.items}
        answers[key] = {image: Answer(line["caption"], line.get("ended")) for image, line in own.items()}
    return [[answers[one.sha256, number] for number in range(len(prompts))] for one in checkpoints]


def setup_metadata(cfg: Config, rules: PromptRules, *packages: str) -> dict[str, Any]:
    """What is the same for all checkpoints, for the report; the versions of further `packages`, too."""
    model = {key: getattr(cfg.model, key, None) for key in MODEL_KEYS}
    asked = rules.provenance() | {"prompt": cfg.model.as_read(rules.prompt)}
    return {**asked, "batch_size": batch_size(cfg), "model": model, "versions": versions(*packages)}


def decoding_line(setup: Mapping[str, Any]) -> str:
    """A note of reports, from `setup_metadata`."""
    decoding = ", ".join(f"{key} {value}" for key, value in setup["decoding"].items())
    return f"Decoding, the same for all checkpoints: {decoding}."


def batch_size(cfg: Config) -> int:
    """Images that are answered together."""
    return cfg.run.batch_size_eval or (cfg.batch_size() if cfg.datasets else BATCH_SIZE)
