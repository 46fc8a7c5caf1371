"""The failure rate from config to report: the steps of `eval_scripts/eval_failure_rate.py`."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.utils import as_json, write_whole
from minigpt4.evaluation.bootstrap import wilson
from minigpt4.evaluation.command import EvaluationRun, NamedCheckpoint
from minigpt4.evaluation.failure_rules import (
    EMPTY,
    JUDGED_KINDS,
    KINDS,
    OFF_IMAGE,
    OFF_INSTRUCTION,
    RULED_KINDS,
    TASKS,
    Failure,
    find_failures,
)
from minigpt4.evaluation.generate import predict, setup_metadata
from minigpt4.evaluation.judge import Judge, Question
from minigpt4.evaluation.questions import IMAGE_MARKS
from minigpt4.evaluation.report import Table, decoding_line, document
from minigpt4.inference.image_list import ImageFile, ImageList
from minigpt4.inference.pipeline import PromptRules, image_reader

QUESTION = """Somebody was shown this image and was told: "{instruction}"
The answer was:
<answer>
{text}
</answer>
Judge two things and nothing else; style, length and repetition do not matter.
1. IMAGE: is the answer about this image? Small mistakes are fine. Say no if it is mostly about things that are not \
there.
2. INSTRUCTION: is the answer of the kind that was asked for? Say no for a refusal, a question, a caption of a few \
words where a detailed description was asked for, or prose where a poem was asked for.
Reply with exactly two lines, each with yes or no and a short reason:
IMAGE: yes or no - reason
INSTRUCTION: yes or no - reason"""
LINE = re.compile(r"^\W*(?:\d\W+)?(IMAGE|INSTRUCTION)\W+(yes|no)\b(?:[^\w\n]|_)*(.*)$", re.IGNORECASE | re.MULTILINE)
KIND_OF = {"IMAGE": OFF_IMAGE, "INSTRUCTION": OFF_INSTRUCTION}


@dataclass
class AskedAnswer:
    """One answer of one checkpoint."""

    checkpoint: str
    task: str
    image_id: str
    image: str
    """File."""

    instruction: str
    """As a person reads it, without marks for the image."""

    text: str
    ended: bool | None
    """Whether the model ended it itself; see `find_failures`."""

    failures: list[Failure]


def evaluate(
    run: EvaluationRun, images: Sequence[ImageFile], tasks: Sequence[str], judge: Judge | None = None
) -> dict[str, Any] | None:
    """Give `tasks`, keys of `TASKS`; find failures, and report. Every rank must call it.

    Returns the content of `failures.json`, on rank 0. MiniGPT4Error for a fault in configuration, images, checkpoints
    or judge.
    """
    cfg, checkpoints, folder, _ = run
    prompts, rules = {task: getattr(cfg.run.failure_prompts, task) for task in tasks}, []
    for task, prompt in prompts.items():
        rules.append(PromptRules.of(cfg, prompt, source=f"run.failure_prompts.{task}"))
    said = predict(run, ImageList(images, image_reader(cfg)), rules)
    if said is None:
        return None
    answers = []
    for checkpoint, own in zip(checkpoints, said, strict=True):
        for (task, prompt), texts in zip(prompts.items(), own, strict=True):
            instruction = " ".join(IMAGE_MARKS.sub(" ", prompt).split())
            for item in images:
                text, ended = texts[item.image_id].text, texts[item.image_id].ended
                file, found = str(item.file.resolve()), find_failures(text, TASKS[task].form, ended)
                answers.append(AskedAnswer(checkpoint.name, task, item.image_id, file, instruction, text, ended, found))
    judged_by = None
    if judge is not None:
        unread = ask_judge(judge, answers)
        judged_by = {"url": judge.endpoint.address, "model": judge.endpoint.model, "unread_replies": unread}
    setup = setup_metadata(cfg, rules[0])
    del setup["prompt"]
    whole_prompts = {task: own.prompt for task, own in zip(tasks, rules, strict=True)}
    results = _results(checkpoints, tasks, answers, {"prompts": whole_prompts, **setup, "judge": judged_by})
    plain = [{key: value for key, value in asdict(one).items() if key != "failures"} for one in answers]
    write_whole(folder / "answers.json", as_json(plain))
    write_whole(folder / "failures.md", markdown(results, answers))
    write_whole(folder / "failures.json", as_json(results))
    return results


# A judge who sees the image


def ask_judge(judge: Judge, answers: Sequence[AskedAnswer]) -> int:
    """Add what the judge finds; how many replies could not be read. Empty answers are not judged."""
    asked = [one for one in answers if all(failure.kind != EMPTY for failure in one.failures)]
    texts = [QUESTION.format(instruction=one.instruction, text=one.text) for one in asked]
    questions = [Question(text, Path(one.image)) for text, one in zip(texts, asked, strict=True)]
    found = [read_reply(reply) for reply in judge.ask_all(questions)]
    for one, failures in zip(asked, found, strict=True):
        one.failures.extend(failures or [])
    return found.count(None)


def read_reply(reply: str) -> list[Failure] | None:
    """What a reply finds; None if it does not answer both questions."""
    said = {name.upper(): (word.lower(), reason.strip()) for name, word, reason in LINE.findall(reply)}
    if set(said) != set(KIND_OF):
        return None
    denied = {kind: said[name][1] for name, kind in KIND_OF.items() if said[name][0] == "no"}
    return [Failure(kind, f"the judge: {reason or 'no reason given'}") for kind, reason in denied.items()]


# The report: no file holds a time or the number of processes, so the same measurement writes the same bytes


def _results(
    checkpoints: Sequence[NamedCheckpoint],
    tasks: Sequence[str],
    answers: Sequence[AskedAnswer],
    setup: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `failures.json`."""
    kinds = KINDS if setup["judge"] else RULED_KINDS
    notes = [f"An answer fails if it is at least one of: {', '.join(kinds)}.", "In brackets: 95% Wilson interval."]
    unknown = sum(answer.ended is None for answer in answers)
    if unknown:
        notes.append(f"How {unknown} answers ended is not recorded; they cannot count as cut off.")
    if judge := setup["judge"]:
        notes.append(f"Judge: {judge['model']} at {judge['url']}.")
        if judge["unread_replies"]:
            notes.append(f"The judge's reply to {judge['unread_replies']} answers could not be read.")
    else:
        notes.append(f"No judge was asked, so nothing counts as {' or '.join(JUDGED_KINDS)} by itself.")
    rows = []
    for one in checkpoints:
        own = [answer for answer in answers if answer.checkpoint == one.name]
        rates = {task: _rate([answer for answer in own if answer.task == task]) for task in tasks}
        rows.append({**one.identity, "tasks": rates, "card": one.card})
    failures = []
    for answer in [one for one in answers if one.failures]:
        place = {"checkpoint": answer.checkpoint, "task": answer.task, "image_id": answer.image_id}
        kinds = {failure.kind: failure.evidence for failure in answer.failures}
        failures.append({**place, "kinds": kinds, "ended": answer.ended, "text": answer.text})
    titles = {task: TASKS[task].title for task in tasks}
    images = len({answer.image_id for answer in answers})
    return {"images": images, "tasks": titles, **setup, "notes": notes, "checkpoints": rows, "failures": failures}


def _rate(answers: Sequence[AskedAnswer]) -> dict[str, Any]:
    failed = sum(bool(answer.failures) for answer in answers)
    kinds = Counter(failure.kind for answer in answers for failure in answer.failures)
    return {
        "images": len(answers),
        "failed": failed,
        "rate": failed / len(answers),
        "interval": wilson(failed, len(answers)),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
    }


def markdown(results: Mapping[str, Any], answers: Sequence[AskedAnswer]) -> str:
    """The content of `failures.md`."""
    lines = [*results["notes"], decoding_line(results)]
    lines += [f"Prompt of {name}: `{prompt!r}`" for name, prompt in results["prompts"].items()]
    lines.append(f"Stop: `{results['stop']}`")
    kinds, rows = KINDS if results["judge"] else RULED_KINDS, []
    for one in results["checkpoints"]:
        for name, rate in one["tasks"].items():
            counts = [str(rate["kinds"].get(kind, 0)) for kind in kinds]
            rows.append([one["name"], name, *counts, str(rate["failed"])])
    by_kind = Table(["checkpoint", "task", *kinds, "any"], rows).markdown()
    sections = [f"## Answers by kind\n\n{by_kind}", *_listed(answers)]
    return document(headline(results), rate_table(results), lines, sections)


def _listed(answers: Sequence[AskedAnswer]) -> Iterator[str]:
    """A section a kind, with every answer and what shows the failure."""
    for kind in KINDS:
        found = [(answer, one) for answer in answers for one in answer.failures if one.kind == kind]
        if found:
            yield f"## {kind}: {len(found)}"
        for answer, one in found:
            text = "\n".join(f"    {line}" for line in answer.text.splitlines() or [""])
            yield f"**{answer.checkpoint}**, {answer.task}, {answer.image_id}: {one.evidence}\n\n{text}"


def headline(results: Mapping[str, Any]) -> str:
    """What was measured."""
    return f"Failure rate, {results['images']} images"


def rate_table(results: Mapping[str, Any]) -> Table:
    """The published form: a row a checkpoint, a column a task, with 95% intervals."""
    rows = []
    for one in results["checkpoints"]:
        rates = [(one["tasks"][name]["rate"], *one["tasks"][name]["interval"]) for name in results["tasks"]]
        rows.append([one["name"], *(f"{rate:.1%} ({low:.1%} - {high:.1%})" for rate, low, high in rates)])
    return Table(["checkpoint", *results["tasks"].values()], rows)


def summary(results: Mapping[str, Any]) -> str:
    """What the terminal shows of `failures.json`."""
    return "\n".join([headline(results), "", rate_table(results).markdown(), *results["notes"]])
