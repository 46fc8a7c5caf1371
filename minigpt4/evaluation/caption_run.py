"""A caption evaluation from configuration to report: `eval_scripts/eval_flickr30k.py` in steps."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minigpt4.common.distributed import Processes
from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.experiment import Experiment
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import versions
from minigpt4.datasets import ImageCaptionJson, build_datasets
from minigpt4.evaluation.caption_data import CaptionData, ReferenceMode
from minigpt4.evaluation.caption_metrics import CaptionScorer, metric_versions
from minigpt4.evaluation.captioning import Captioner, CaptionRules
from minigpt4.evaluation.checkpoint_list import NamedCheckpoint
from minigpt4.evaluation.predictions import Predictions
from minigpt4.evaluation.report import CaptionReport, ScoredCheckpoint, finished

log = logging.getLogger(__name__)

REPORTED_OF_MODEL = ("arch", "model_type", "llama_model", "llm_precision", "vit_model", "vit_precision", "image_size")
SECONDS_BETWEEN_LINES = 60
SAMPLED_BYTES = 1 << 20
OUT_OF_MEMORY = "The GPU's memory is full: a smaller run.batch_size_eval, or fewer beams, needs less."


@dataclass(frozen=True)
class CaptionRun:
    """What to evaluate, and how."""

    cfg: Experiment
    checkpoints: Sequence[NamedCheckpoint]
    folder: Path
    reference_mode: ReferenceMode
    families: Sequence[str]
    notes: Sequence[str] = ()
    """Lines for the report, such as why a metric is missing."""


def for_evaluation(cfg: Experiment) -> Experiment:
    """The experiment without what an evaluation does not read: `model.ckpt` and the training annotations."""
    split = _split(cfg)
    datasets = {}
    for name, section in cfg.datasets.items():
        info = section.build_info
        own = getattr(info, f"{split}_ann_path", None)
        info = dataclasses.replace(info, ann_path=own) if own and info.image_path else info
        datasets[name] = dataclasses.replace(section, build_info=info)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, ckpt=None), datasets=datasets)


def evaluate(run: CaptionRun, processes: Processes) -> dict[str, Any] | None:
    """Caption, score and report; every rank must call it. The content of `metrics.json`, on rank 0.

    Raises:
        MiniGPT4Error: something is wrong with configuration, data or checkpoints; the text says what.
    """
    cfg = run.cfg.run
    data = _read_data(run.cfg)
    references = data.references(run.reference_mode)
    rules = CaptionRules.of(run.cfg.model, cfg.generation, cfg.seed)
    log.info("%d images; prompt %r; stop %s; %s", len(data), rules.prompt, rules.stop, rules.decoding)
    batches = data.batches(_batch_size(run.cfg))
    stores = _stores(run, data, batches, rules, processes)
    _complete(run, data, batches, rules, stores, processes)
    gathered = processes.gather([store.done for store in stores])  # a rank need not see the files of another node
    if gathered is None:
        return None
    said = [_in_order(data, [rank[index] for rank in gathered]) for index in range(len(stores))]
    setup = _setup(run, rules)
    key = _key(run, setup, references, said)
    facts = finished(run.folder, key)
    if facts is None:
        report = _report(run, data, setup, references, said, key)
        report.write(run.folder)
        facts = report.facts
    return facts


# Data


def _split(cfg: Experiment) -> str:
    splits = cfg.run.test_splits or ["test"]
    if len(splits) != 1:
        raise ConfigError(f"{cfg.source}: run.test_splits: {', '.join(splits)}: an evaluation takes one split")
    return splits[0]


def _read_data(cfg: Experiment) -> CaptionData:
    if len(cfg.datasets) != 1:
        names = ", ".join(cfg.datasets) or "none"
        raise ConfigError(f"{cfg.source}: datasets: {names}: an evaluation of captions takes exactly one dataset")
    split = _split(cfg)
    ((name, own),) = build_datasets(cfg.datasets, [split]).items()
    if not isinstance(own[split], ImageCaptionJson):
        raise ConfigError(f"{cfg.source}: datasets.{name}.builder: captions are evaluated on image_caption_json only")
    return CaptionData(own[split])


def _batch_size(cfg: Experiment) -> int:
    return cfg.run.batch_size_eval or cfg.batch_size()


# What captions are made from


def _stores(
    run: CaptionRun,
    data: CaptionData,
    batches: Sequence[Sequence[int]],
    rules: CaptionRules,
    processes: Processes,
) -> list[Predictions]:
    """The captions of each checkpoint, as far as they are there."""
    ids = [[data.items[number].image_id for number in batch] for batch in batches]
    made_from = _made_from(run.cfg, data, rules, processes) | {"batches": ids}
    hashes = [checkpoint.sha256 for checkpoint in run.checkpoints]
    by_hash = {sha: Predictions(run.folder, made_from | {"checkpoint": sha}, ids, processes.rank) for sha in hashes}
    return [by_hash[sha] for sha in hashes]


def _made_from(cfg: Experiment, data: CaptionData, rules: CaptionRules, processes: Processes) -> dict[str, Any]:
    model = dataclasses.asdict(cfg.model)
    frozen = sorted(cfg.model.llm_directory().iterdir())
    frozen += [Path(path) for key in ("vit_weights", "q_former_model") if (path := model.get(key))]
    return {
        "decoding": dataclasses.asdict(rules.decoding),
        "prompt": rules.prompt,
        "stop": rules.stop,
        "seed": rules.seed if rules.decoding.do_sample else None,
        "model": model,
        "frozen_files": [file_sample(path) for path in frozen if path.is_file()],
        "images": [[item.image_id, *file_sample(item.file)] for item in data.items],
        "versions": processes.share(versions()),
        "device": processes.device.type,
    }


def file_sample(path: Path) -> list[Any]:
    """Name, size and hash of beginning, middle and end of a file; 13 GB are known in an instant, if not proved."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({0, max(0, size // 2), max(0, size - SAMPLED_BYTES)}):
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES))
    return [path.name, size, digest.hexdigest()[:16]]


# Captions


def _complete(
    run: CaptionRun,
    data: CaptionData,
    batches: Sequence[Sequence[int]],
    rules: CaptionRules,
    stores: Sequence[Predictions],
    processes: Processes,
) -> None:
    """Make the captions that are missing; the model is built only if there are any."""
    missing = _missing(stores, len(batches), processes)
    if not any(missing):
        log.info("All captions of %d checkpoints are there; nothing is generated", len(stores))
        return
    model_class = registry.get_model_class(run.cfg.model.arch)
    model = model_class.from_config(run.cfg.model, device=processes.device).eval()
    captioner = Captioner(
        model, data, batches, rules, keep_features=len(stores) > 1, num_workers=run.cfg.run.num_workers
    )
    try:
        for checkpoint, store, numbers in zip(run.checkpoints, stores, missing, strict=True):
            own = [number for number in numbers[processes.rank :: processes.world_size] if number not in store.done]
            _caption(captioner, checkpoint, store, own, processes)
    except torch.OutOfMemoryError as error:
        raise RunError(f"{error}\n{OUT_OF_MEMORY}") from error


def _missing(stores: Sequence[Predictions], batches: int, processes: Processes) -> list[list[int]]:
    """Numbers of the batches that no rank has, of each checkpoint; the same on every rank, which shares them out."""
    gathered = processes.gather([list(store.done) for store in stores])
    missing = None
    if gathered is not None:
        found = [set().union(*(rank[index] for rank in gathered)) for index in range(len(stores))]
        missing = [[number for number in range(batches) if number not in done] for done in found]
    return processes.share(missing)


def _caption(
    captioner: Captioner,
    checkpoint: NamedCheckpoint,
    store: Predictions,
    wanted: Sequence[int],
    processes: Processes,
) -> None:
    """The missing captions of one checkpoint."""
    if not wanted:
        log.info("%s: all captions are there", checkpoint.name)
        return
    captioner.load(checkpoint.path)
    items, batches = captioner.data.items, captioner.batches
    total = sum(len(batches[number]) for number in wanted)
    start = said = time.monotonic()
    with tqdm(total=total, desc=checkpoint.name, unit="image", disable=None if processes.is_main else True) as bar:
        done = 0
        for number, captions in captioner.captions(wanted):
            ids = [items[place].image_id for place in batches[number]]
            store.add(number, dict(zip(ids, captions, strict=True)))
            bar.update(len(ids))
            done += len(ids)
            if (now := time.monotonic()) - said > SECONDS_BETWEEN_LINES:
                log.info("%s: %d of %d images of this process", checkpoint.name, done, total)
                said = now
    log.info("%s: %d captions in %.1f s on this process", checkpoint.name, total, time.monotonic() - start)


def _in_order(data: CaptionData, parts: Sequence[Mapping[int, Mapping[str, str]]]) -> dict[str, str]:
    """Captions by image id in the order of the data."""
    everyone = {image_id: text for part in parts for batch in part.values() for image_id, text in batch.items()}
    return {item.image_id: everyone[item.image_id] for item in data.items}


# Scores


def _setup(run: CaptionRun, rules: CaptionRules) -> dict[str, Any]:
    """What is the same for all checkpoints, for the report."""
    model = dataclasses.asdict(run.cfg.model)
    return {
        "decoding": dataclasses.asdict(rules.decoding),
        "prompt": rules.prompt,
        "stop": rules.stop,
        "seed": rules.seed if rules.decoding.do_sample else None,
        "batch_size": _batch_size(run.cfg),
        "model": {key: model.get(key) for key in REPORTED_OF_MODEL},
        "versions": versions() | metric_versions(),
    }


def _key(run: CaptionRun, setup: Mapping[str, Any], *data: Any) -> str:
    """Hash of everything that a report depends on."""
    plan = [run.reference_mode, run.families, run.notes]
    checkpoints = [[one.name, str(one.path), one.sha256, one.card] for one in run.checkpoints]
    text = json.dumps([plan, checkpoints, setup, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _report(
    run: CaptionRun,
    data: CaptionData,
    setup: Mapping[str, Any],
    references: Mapping[str, Sequence[str]],
    said: Sequence[Mapping[str, str]],
    key: str,
) -> CaptionReport:
    scorer = CaptionScorer(references, run.families)
    log.info("Scoring %d captions of %d checkpoints", len(data), len(said))
    rows = [
        ScoredCheckpoint(checkpoint, captions, scorer.score(captions))
        for checkpoint, captions in zip(run.checkpoints, said, strict=True)
    ]
    title = f"{data.dataset.name}, {data.dataset.split}"
    return CaptionReport(
        title, key, data.items, references, run.reference_mode, scorer.metrics, rows, setup, list(run.notes)
    )
