"""A caption evaluation from config to report: the steps of `eval_scripts/eval_flickr30k.py`."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError
from minigpt4.datasets import ImageCaptionJson, build_datasets
from minigpt4.evaluation.caption_data import CaptionData, ReferenceMode
from minigpt4.evaluation.generate import NamedCheckpoint, PredictionRun, batch_size, setup_metadata
from minigpt4.evaluation.metrics import CaptionScorer, metric_versions
from minigpt4.evaluation.report import CaptionReport, ScoredCheckpoint, finished
from minigpt4.inference.pipeline import PromptRules
from minigpt4.models.feature_cache import feature_cache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionRun:
    """What to evaluate, and how."""

    cfg: Config
    checkpoints: Sequence[NamedCheckpoint]
    folder: Path
    reference_mode: ReferenceMode
    families: Sequence[str]
    notes: Sequence[str] = ()
    """Lines for the report, such as why a metric is missing."""


def for_evaluation(cfg: Config) -> Config:
    """The config without what an evaluation does not read: `model.ckpt` and the training annotations."""
    split = _split(cfg)
    datasets = {}
    for name, section in cfg.datasets.items():
        info = section.build_info
        own = getattr(info, f"{split}_ann_path", None)
        info = dataclasses.replace(info, ann_path=own) if own and info.image_path else info
        datasets[name] = dataclasses.replace(section, build_info=info)
    return cfg.replace(model=dataclasses.replace(cfg.model, ckpt=None), datasets=datasets)


def evaluate(run: CaptionRun, processes: Processes) -> dict[str, Any] | None:
    """Caption, score and report; every rank must call it. The content of `metrics.json`, on rank 0.

    Raises:
        MiniGPT4Error: something is wrong with configuration, data or checkpoints; the text says what.
    """
    cfg = run.cfg.run
    data = read_data(run.cfg)
    references = data.references(run.reference_mode)
    rules = PromptRules.of(run.cfg.model, cfg.generation, cfg.seed)
    log.info("%d images; prompt %r; stop %s; %s", len(data), rules.prompt, rules.stop, rules.decoding)
    batches = data.batches(batch_size(run.cfg))
    answers = PredictionRun(run.cfg, data, batches, [rules], run.checkpoints, run.folder).answers(processes)
    if answers is None:
        return None
    said = [{image_id: answer.text for image_id, answer in own.items()} for (own,) in answers]
    setup = setup_metadata(run.cfg, rules)
    setup["versions"] |= metric_versions()
    key = _key(run, setup, references, said)
    results = finished(run.folder, key)
    if results is None:
        scorer = CaptionScorer(references, run.families)
        log.info("Scoring %d captions of %d checkpoints", len(data), len(said))
        rows = [ScoredCheckpoint(*row) for row in zip(run.checkpoints, said, scorer.score_all(said), strict=True)]
        report = CaptionReport(
            title=f"{data.dataset.name}, {data.dataset.split}",
            key=key,
            items=data.items,
            references=references,
            reference_mode=run.reference_mode,
            metrics=scorer.metrics,
            rows=rows,
            setup=setup,
            notes=list(run.notes),
        )
        report.write(run.folder)
        results = report.results
    return results


def _split(cfg: Config) -> str:
    splits = cfg.run.test_splits or ["test"]
    if len(splits) != 1:
        raise ConfigError(f"{cfg.source}: run.test_splits: {', '.join(splits)}: an evaluation takes one split")
    return splits[0]


def read_data(cfg: Config) -> CaptionData:
    """The images of an evaluation; ConfigError unless its one dataset has images and captions."""
    if len(cfg.datasets) != 1:
        names = ", ".join(cfg.datasets) or "none"
        raise ConfigError(f"{cfg.source}: datasets: {names}: an evaluation of captions takes exactly one dataset")
    split = _split(cfg)
    ((name, own),) = build_datasets(cfg.datasets, [split], feature_cache(cfg)).items()
    if not isinstance(own[split], ImageCaptionJson):
        raise ConfigError(f"{cfg.source}: datasets.{name}.builder: captions are evaluated on image_caption_json only")
    return CaptionData(own[split])


def _key(run: CaptionRun, setup: Mapping[str, Any], *data: Any) -> str:
    """Hash of everything that a report depends on."""
    plan = [run.reference_mode, run.families, run.notes]
    checkpoints = [[one.name, str(one.path), one.sha256, one.card] for one in run.checkpoints]
    text = json.dumps([plan, checkpoints, setup, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
