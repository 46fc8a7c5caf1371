"""The failure rate from config to report: the steps of `eval_scripts/eval_failure_rate.py`."""

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import JsonLines, as_json, write_whole
from minigpt4.evaluation.bootstrap import wilson
from minigpt4.evaluation.failure_rules import (
    EMPTY,
    JUDGED_KINDS,
    KINDS,
    OFF_IMAGE,
    OFF_INSTRUCTION,
    RULED_KINDS,
    Failure,
    Task,
    find_failures,
)
from minigpt4.evaluation.generate import NamedCheckpoint, PredictionRun, batch_size, setup_metadata
from minigpt4.evaluation.judge import AT_ONCE, Judge, Question
from minigpt4.evaluation.report import Table
from minigpt4.inference.image_list import ImageFile, ImageList
from minigpt4.inference.pipeline import PromptRules, image_processor
from minigpt4.models.feature_cache import feature_cache
from minigpt4.models.generation import Answer

log = logging.getLogger(__name__)


VERDICTS = "verdicts.jsonl"
JSON, MARKDOWN, ANSWERS = "failures.json", "failures.md", "answers.json"
IMAGE_MARKS = re.compile(r"</?Img>|<ImageHere>")
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


# Answers


@dataclass(frozen=True)
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

    failures: tuple[Failure, ...] = ()

    @cached_property
    def key(self) -> str:
        """Of what a person sees: the same for every checkpoint that gives this answer."""
        seen = json.dumps([self.task, self.image_id, self.instruction, self.text])
        return hashlib.sha256(seen.encode()).hexdigest()[:16]


def write_answers(file: Path, answers: Sequence[AskedAnswer]) -> None:
    """Write answers, without their failures, as JSON; ConfigError if the disk refuses."""
    entries = [{key: value for key, value in asdict(one).items() if key != "failures"} for one in answers]
    write_whole(file, as_json(entries))


def read_answers(file: Path) -> list[AskedAnswer]:
    """The answers of a file of `write_answers`; ConfigError if it is none."""
    try:
        return [AskedAnswer(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; eval_failure_rate.py writes it") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: not a file of answers: {error}") from error


# Verdicts of people: a line a verdict; the last one on an answer counts


def read_verdicts(file: Path) -> dict[str, list[str]]:
    """Kinds of failure by the key of the answer, none for a good one; ConfigError if there is no file."""
    if not file.is_file():
        raise ConfigError(f"--verdicts: there is no file {file}; eval_scripts/judge_by_hand.py writes it")
    return _by_key(JsonLines(file).read())


def _by_key(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {record["answer"]: record["kinds"] for record in records if _is_verdict(record)}


def _is_verdict(record: Mapping[str, Any]) -> bool:
    kinds = record.get("kinds")
    return isinstance(record.get("answer"), str) and isinstance(kinds, list) and set(kinds) <= set(KINDS)


class AnnotationSession:
    """One person goes through answers, in an order that tells nothing of the checkpoints.

    Args:
        answers: of all checkpoints; equal ones about an image are shown once.
        file: of the verdicts; those in it are not asked again.
        seed: of the order.
    """

    def __init__(self, answers: Sequence[AskedAnswer], file: Path, seed: int) -> None:
        self.answers = list({answer.key: answer for answer in answers}.values())
        self.answers.sort(key=lambda answer: answer.key)  # not by checkpoint, however the file was written
        random.Random(seed).shuffle(self.answers)
        self._lines = JsonLines(file)
        self._lines.keep(_is_verdict)
        self.verdicts = _by_key(self._lines.read())

    @property
    def judged(self) -> int:
        """Answers with a verdict."""
        return sum(answer.key in self.verdicts for answer in self.answers)

    def next_after(self, place: int) -> int:
        """Place of the first answer after `place` that has no verdict; the number of answers if there is none."""
        places = range(place + 1, len(self.answers))
        return next((other for other in places if self.answers[other].key not in self.verdicts), len(self.answers))

    def judge(self, place: int, kinds: Sequence[str]) -> None:
        """Keep a verdict, at once."""
        key = self.answers[place].key
        self.verdicts[key] = list(kinds)
        self._lines.append({"answer": key, "kinds": self.verdicts[key]})


# Verdicts of a judge who sees the image


def ask_judge(judge: Judge, answers: Sequence[AskedAnswer], at_once: int) -> tuple[list[AskedAnswer], int]:
    """The answers with what the judge finds, and how many replies could not be read, which find nothing.

    Empty answers are not judged. Raises RunError if the judge cannot be reached.
    """
    asked = [answer for answer in answers if all(failure.kind != EMPTY for failure in answer.failures)]
    questions = [
        Question(QUESTION.format(instruction=answer.instruction, text=answer.text), Path(answer.image))
        for answer in asked
    ]
    replies = dict(zip(map(id, asked), judge.ask_all(questions, at_once=at_once), strict=True))
    judged, unread = [], 0
    for answer in answers:
        reply = replies.get(id(answer))
        found = [] if reply is None else read_reply(reply)
        if found is None:
            if not unread:
                log.warning("A reply of the judge cannot be read: %.200r", reply)
            unread += 1
        judged.append(replace(answer, failures=(*answer.failures, *(found or []))))
    return judged, unread


def read_reply(reply: str) -> list[Failure] | None:
    """What a reply finds; None if it does not answer both questions."""
    said = {name.upper(): (word.lower(), reason.strip()) for name, word, reason in LINE.findall(reply)}
    if set(said) != set(KIND_OF):
        return None
    return [
        Failure(kind, f"the judge: {said[name][1] or 'no reason given'}")
        for name, kind in KIND_OF.items()
        if said[name][0] == "no"
    ]


# The report


@dataclass(frozen=True)
class FailureReport:
    """The table in the published form, and every failure with its text.

    No file holds a time or the number of processes: the same measurement writes the same bytes.
    """

    checkpoints: Sequence[NamedCheckpoint]
    tasks: Sequence[Task]
    answers: Sequence[AskedAnswer]
    """Of every checkpoint to every task about every image, with their failures."""

    setup: Mapping[str, Any]
    """Prompts, decoding, versions, judge: the same for all checkpoints."""

    def write(self, folder: Path) -> None:
        """Write every file, `failures.json` last; ConfigError if the disk refuses."""
        write_answers(folder / ANSWERS, self.answers)
        write_whole(folder / MARKDOWN, self.markdown())
        write_whole(folder / JSON, as_json(self.results))

    @cached_property
    def results(self) -> dict[str, Any]:
        """The content of `failures.json`."""
        return {
            "images": len({answer.image_id for answer in self.answers}),
            "tasks": {task.name: task.title for task in self.tasks},
            **self.setup,
            "notes": self._notes(),
            "checkpoints": [self._checkpoint(checkpoint) for checkpoint in self.checkpoints],
            "failures": [
                {
                    "checkpoint": answer.checkpoint,
                    "task": answer.task,
                    "image_id": answer.image_id,
                    "kinds": {failure.kind: failure.evidence for failure in answer.failures},
                    "ended": answer.ended,
                    "text": answer.text,
                }
                for answer in self.answers
                if answer.failures
            ],
        }

    def _checkpoint(self, checkpoint: NamedCheckpoint) -> dict[str, Any]:
        own = [answer for answer in self.answers if answer.checkpoint == checkpoint.name]
        by_task = {task.name: [answer for answer in own if answer.task == task.name] for task in self.tasks}
        return {
            "name": checkpoint.name,
            "file": str(checkpoint.path),
            "sha256": checkpoint.sha256,
            "tasks": {name: _rate(answers) for name, answers in by_task.items()},
            "card": checkpoint.card,
        }

    def _notes(self) -> list[str]:
        """What a reader has to know about the numbers."""
        notes = [
            "An answer fails if it is at least one of: " + ", ".join(self._kinds()) + ".",
            "In brackets: 95% Wilson interval.",
        ]
        unknown = sum(answer.ended is None for answer in self.answers)
        if unknown:
            notes.append(f"Of {unknown} answers nobody wrote down how they ended; they cannot count as cut off.")
        if judge := self.setup["judge"]:
            notes.append(f"Judge: {judge['model']} at {judge['url']}.")
            if judge["unread_replies"]:
                notes.append(f"The judge's reply to {judge['unread_replies']} answers could not be read.")
        else:
            notes.append(f"No judge was asked, so nothing counts as {' or '.join(JUDGED_KINDS)} by itself.")
        if by_hand := self.setup["judged_by_hand"]:
            notes.append(
                f"A person judged {by_hand} of {len(self.answers)} answers, and these verdicts count in place of all "
                f"others; on {self.setup['agreed_with_person']} of them the others agree on whether the answer fails."
            )
        return notes

    def _kinds(self) -> list[str]:
        """The kinds that could be found."""
        is_judged = self.setup["judge"] or self.setup["judged_by_hand"]
        return list(KINDS if is_judged else RULED_KINDS)

    def markdown(self) -> str:
        """The content of `failures.md`."""
        decoding = ", ".join(f"{key} {value}" for key, value in self.setup["decoding"].items())
        lines = [*self.results["notes"], f"Decoding, the same for all checkpoints: {decoding}."]
        lines += [f"Prompt of {name}: `{prompt!r}`" for name, prompt in self.setup["prompts"].items()]
        lines.append(f"Stop: `{self.setup['stop']}`")
        parts = [
            f"# {headline(self.results)}",
            rate_table(self.results).markdown(),
            "\n".join(f"- {line}" for line in lines),
        ]
        parts += [f"## Answers by kind\n\n{self._kind_table().markdown()}", *self._listed()]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def _kind_table(self) -> Table:
        rows = []
        for one in self.results["checkpoints"]:
            for name, rate in one["tasks"].items():
                counts = [str(rate["kinds"].get(kind, 0)) for kind in self._kinds()]
                rows.append([one["name"], name, *counts, str(rate["failed"])])
        return Table(["checkpoint", "task", *self._kinds(), "any"], rows)

    def _listed(self) -> Iterator[str]:
        """A section a kind, with every answer and what shows the failure."""
        for kind in KINDS:
            found = [(answer, one) for answer in self.answers for one in answer.failures if one.kind == kind]
            if found:
                yield f"## {kind}: {len(found)}"
            for answer, one in found:
                text = "\n".join(f"    {line}" for line in answer.text.splitlines() or [""])
                yield f"**{answer.checkpoint}**, {answer.task}, {answer.image_id}: {one.evidence}\n\n{text}"


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


# The run


@dataclass(frozen=True)
class FailureRun:
    """What to measure, and how."""

    cfg: Config
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
    rules = []
    for task in run.tasks:
        settings, key = replace(run.cfg.run.generation, prompt=run.prompt(task)), f"run.failure_prompts.{task.name}"
        own = PromptRules.of(run.cfg.model, settings, run.cfg.run.seed, key=key)
        log.info(
            "%s: %d images; prompt %r; stop %s; %s", task.name, len(run.images), own.prompt, own.stop, own.decoding
        )
        rules.append(own)
    images = ImageList(run.images, image_processor(run.cfg), feature_cache(run.cfg))
    batches = images.batches(batch_size(run.cfg))
    said = PredictionRun(run.cfg, images, batches, rules, run.checkpoints, run.folder).answers(processes)
    if said is None:
        return None
    answers, judging = _judged(_asked(run, said), run)
    setup = setup_metadata(run.cfg, rules[0])
    del setup["prompt"]
    setup = {"prompts": {task.name: own.prompt for task, own in zip(run.tasks, rules, strict=True)}, **setup, **judging}
    report = FailureReport(run.checkpoints, run.tasks, answers, setup)
    report.write(run.folder)
    return report.results


def _asked(run: FailureRun, said: Sequence[Sequence[dict[str, Answer]]]) -> list[AskedAnswer]:
    """Every answer, by checkpoint, task and image, with what the rules find in it."""
    return [
        AskedAnswer(
            checkpoint.name,
            task.name,
            item.image_id,
            str(item.file.resolve()),
            " ".join(IMAGE_MARKS.sub(" ", run.prompt(task)).split()),
            texts[item.image_id].text,
            texts[item.image_id].ended,
            tuple(find_failures(texts[item.image_id].text, task.form, texts[item.image_id].ended)),
        )
        for checkpoint, own in zip(run.checkpoints, said, strict=True)
        for task, texts in zip(run.tasks, own, strict=True)
        for item in run.images
    ]


def _judged(answers: list[AskedAnswer], run: FailureRun) -> tuple[list[AskedAnswer], dict[str, Any]]:
    """The answers with what judge and person say, and the report's metadata about the two."""
    metadata: dict[str, Any] = {"judge": None, "judged_by_hand": 0}
    if run.judge is not None:
        answers, unread = ask_judge(run.judge, answers, run.judge_at_once)
        endpoint = run.judge.endpoint
        metadata["judge"] = {"url": endpoint.address, "model": endpoint.model, "unread_replies": unread}
    if run.verdicts is not None:
        verdicts = read_verdicts(run.verdicts)
        by_hand = [answer for answer in answers if answer.key in verdicts]
        metadata["judged_by_hand"] = len(by_hand)
        metadata["agreed_with_person"] = sum(bool(one.failures) == bool(verdicts[one.key]) for one in by_hand)
        for place, one in enumerate(answers):  # a person's verdict stands in place of all others
            if one.key in verdicts:
                failures = tuple(Failure(kind, "seen by a person") for kind in verdicts[one.key])
                answers[place] = replace(one, failures=failures)
    return answers, metadata
