"""The failure rate from configuration to report: `eval_scripts/eval_failure_rate.py` in steps."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.distributed import Processes
from minigpt4.common.experiment import Experiment
from minigpt4.evaluation.asking import Asking, batch_size, setup_facts
from minigpt4.evaluation.checkpoint_list import NamedCheckpoint
from minigpt4.evaluation.failures.answers import AskedAnswer
from minigpt4.evaluation.failures.judge import ask_judge
from minigpt4.evaluation.failures.report import FailureReport
from minigpt4.evaluation.failures.tasks import Task
from minigpt4.evaluation.failures.verdicts import read_verdicts
from minigpt4.evaluation.judge import AT_ONCE, Judge
from minigpt4.features.cache import feature_cache
from minigpt4.inference.image_list import ImageFile, ImageList
from minigpt4.inference.pipeline import image_processor
from minigpt4.inference.prompt_rules import PromptRules
from minigpt4.models.generation import Answer

log = logging.getLogger(__name__)

IMAGE_MARKS = re.compile(r"</?Img>|<ImageHere>")


@dataclass(frozen=True)
class FailureRun:
    """What to measure, and how."""

    cfg: Experiment
    checkpoints: Sequence[NamedCheckpoint]
    images: Sequence[ImageFile]
    tasks: Sequence[Task]
    folder: Path
    judge: Judge | None = None
    judge_at_once: int = AT_ONCE
    verdicts: Path | None = None
    """A person's, which count in place of rules and judge."""

    def prompt(self, task: Task) -> str:
        """What is asked, before it is put into the model's template."""
        return getattr(self.cfg.run.failure_prompts, task.name)


def evaluate(run: FailureRun, processes: Processes) -> dict[str, Any] | None:
    """Ask, find failures and report; every rank must call it. The content of `failures.json`, on rank 0.

    Raises:
        MiniGPT4Error: something is wrong with configuration, images, checkpoints or judge; the text says what.
    """
    rules = [_rules(run, task) for task in run.tasks]
    for task, own in zip(run.tasks, rules, strict=True):
        log.info(
            "%s: %d images; prompt %r; stop %s; %s", task.name, len(run.images), own.prompt, own.stop, own.decoding
        )
    images = ImageList(run.images, image_processor(run.cfg), feature_cache(run.cfg))
    batches = images.batches(batch_size(run.cfg))
    said = Asking(run.cfg, images, batches, rules, run.checkpoints, run.folder).answers(processes)
    if said is None:
        return None
    answers, judging = _judged([answer.by_rules() for answer in _asked(run, said)], run)
    report = FailureReport(run.checkpoints, run.tasks, answers, _setup(run, rules) | judging)
    report.write(run.folder)
    return report.facts


def _rules(run: FailureRun, task: Task) -> PromptRules:
    settings = dataclasses.replace(run.cfg.run.generation, prompt=run.prompt(task))
    return PromptRules.of(run.cfg.model, settings, run.cfg.run.seed, key=f"run.failure_prompts.{task.name}")


def _asked(run: FailureRun, said: Sequence[Sequence[dict[str, Answer]]]) -> list[AskedAnswer]:
    """Every answer, by checkpoint, task and image."""
    return [
        AskedAnswer(
            checkpoint.name,
            task.name,
            item.image_id,
            str(item.file.resolve()),
            " ".join(IMAGE_MARKS.sub(" ", run.prompt(task)).split()),
            texts[item.image_id].text,
            texts[item.image_id].ended,
        )
        for checkpoint, own in zip(run.checkpoints, said, strict=True)
        for task, texts in zip(run.tasks, own, strict=True)
        for item in run.images
    ]


def _judged(answers: list[AskedAnswer], run: FailureRun) -> tuple[list[AskedAnswer], dict[str, Any]]:
    """The answers with what judge and person say, and what the report says about them."""
    facts: dict[str, Any] = {"judge": None, "judged_by_hand": 0}
    if run.judge is not None:
        answers, unread = ask_judge(run.judge, answers, run.judge_at_once)
        endpoint = run.judge.endpoint
        facts["judge"] = {"url": endpoint.address, "model": endpoint.model, "unread_replies": unread}
    if run.verdicts is not None:
        verdicts = read_verdicts(run.verdicts)
        by_hand = [answer for answer in answers if answer.key in verdicts]
        facts["judged_by_hand"] = len(by_hand)
        facts["agreed_with_person"] = sum(bool(one.failures) == bool(verdicts[one.key]) for one in by_hand)
        answers = [one.by_hand(verdicts[one.key]) if one.key in verdicts else one for one in answers]
    return answers, facts


def _setup(run: FailureRun, rules: Sequence[PromptRules]) -> dict[str, Any]:
    setup = setup_facts(run.cfg, rules[0])
    del setup["prompt"]
    return {"prompts": {task.name: own.prompt for task, own in zip(run.tasks, rules, strict=True)}, **setup}
