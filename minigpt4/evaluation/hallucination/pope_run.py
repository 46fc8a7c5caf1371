"""Questions about objects from configuration to scores: `eval_hallucination.py pope` in steps."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.distributed import Processes
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.experiment import Experiment
from minigpt4.common.output_files import write_json
from minigpt4.evaluation.asking import Asking, batch_size, setup_facts
from minigpt4.evaluation.checkpoint_list import NamedCheckpoint
from minigpt4.evaluation.hallucination.pope import ObjectQuestion, score, write_lines
from minigpt4.evaluation.tables import Table, score_table
from minigpt4.features.cache import feature_cache
from minigpt4.inference.image_list import ImageFile, ImageList
from minigpt4.inference.pipeline import image_processor
from minigpt4.inference.prompt_rules import PromptRules
from minigpt4.models.generation import Answer

log = logging.getLogger(__name__)

QUESTION_PLACE = "{}"
PROMPT = f"<Img><ImageHere></Img> {QUESTION_PLACE} Answer with yes or no."
METRICS = ("accuracy", "precision", "recall", "F1", "yes share")


@dataclass(frozen=True)
class PopeRun:
    """What is asked of which checkpoints."""

    cfg: Experiment
    checkpoints: Sequence[NamedCheckpoint]
    questions: Sequence[ObjectQuestion]
    images: Path
    """Folder of the images."""

    folder: Path
    """For all results."""

    prompt: str = PROMPT
    """With `<ImageHere>` and `{}` for the question, before it is put into the model's template."""


def question_files(questions: Sequence[ObjectQuestion], images: Path) -> list[ImageFile]:
    """An entry a question, in whose place the questions of an image stand together; SampleError for missing images."""
    order = {name: place for place, name in enumerate(dict.fromkeys(question.image for question in questions))}
    missing = [name for name in order if not (images / name).is_file()]
    if missing:
        raise SampleError(f"--image-path: {len(missing)} of {len(order)} images are not in {images}: {missing[0]}, ...")
    together = sorted(questions, key=lambda question: order[question.image])
    return [ImageFile(str(question.question_id), images / question.image) for question in together]


def evaluate(run: PopeRun, processes: Processes) -> dict[str, Any] | None:
    """Ask, score and write; every rank must call it. The content of `pope.json`, on rank 0.

    Raises:
        MiniGPT4Error: something is wrong with configuration, images or checkpoints; the text says what.
    """
    rules = _rules(run)
    log.info("%d questions; prompt %r; stop %s; %s", len(run.questions), rules.prompt, rules.stop, rules.decoding)
    files = question_files(run.questions, run.images)
    items = ImageList(files, image_processor(run.cfg), feature_cache(run.cfg))
    asking = Asking(run.cfg, items, items.batches(batch_size(run.cfg)), [rules], run.checkpoints, run.folder)
    said = asking.answers(processes)
    if said is None:
        return None
    setup = setup_facts(run.cfg, dataclasses.replace(rules, own_prompts={}))
    rows = [_row(run, checkpoint, own) for checkpoint, (own,) in zip(run.checkpoints, said, strict=True)]
    facts = {"setup": setup, "images": len({file.file for file in files}), "checkpoints": rows}
    write_json(run.folder / "pope.json", facts, "--save_path")
    return facts


def table(facts: Mapping[str, Any]) -> Table:
    """A row a checkpoint."""
    return score_table({row["name"]: row["scores"] for row in facts["checkpoints"]}, METRICS)


def _rules(run: PopeRun) -> PromptRules:
    if run.prompt.count(QUESTION_PLACE) != 1:
        raise ConfigError(f"--prompt: {run.prompt!r} must hold {QUESTION_PLACE} exactly once, where the question goes")
    settings = dataclasses.replace(run.cfg.run.generation, prompt=run.prompt)
    rules = PromptRules.of(run.cfg.model, settings, run.cfg.run.seed, key="--prompt")
    prompts = {str(one.question_id): rules.prompt.replace(QUESTION_PLACE, one.text) for one in run.questions}
    return dataclasses.replace(rules, own_prompts=prompts)


def _row(run: PopeRun, checkpoint: NamedCheckpoint, answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Scores of one checkpoint, whose answers are written."""
    lines = [dataclasses.asdict(one) | {"answer": answers[str(one.question_id)].text} for one in run.questions]
    for line in lines:
        line["question"] = line.pop("text")  # in files of answers, `text` is what was answered
    file = run.folder / f"answers_{checkpoint.file_name}.jsonl"
    write_lines(file, lines)
    found = score(run.questions, {key: answer.text for key, answer in answers.items()})
    return {"name": checkpoint.name, "file": str(checkpoint.path), "sha256": checkpoint.sha256, **found}
