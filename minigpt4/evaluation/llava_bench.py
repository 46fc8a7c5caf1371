"""LLaVA-Bench (COCO, In-the-Wild): a judge scores an answer beside a reference, and the ratio of the means counts.

Source: Liu et al., Visual Instruction Tuning, 2023, with the files and messages of haotian-liu/LLaVA. There lines are
taken in pairs as they stand; here they are joined by question_id.
"""

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import MinLen

from minigpt4.common.errors import ConfigError, RunError, SampleError, errors_as, first_few, require_same_ids
from minigpt4.common.utils import JsonLines, json_line, read_facts, write_json, write_lines
from minigpt4.evaluation.bootstrap import ratio_interval
from minigpt4.evaluation.judge import Judge, Question
from minigpt4.evaluation.questions import (
    Text,
    VisualQuestion,
    checked,
    fields_of,
    read_answer_lines,
    read_json,
    read_lines,
    read_questions,
)
from minigpt4.evaluation.report import Table, with_intervals
from minigpt4.evaluation.yes_no import without_thought

log = logging.getLogger(__name__)

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE = 0.2
"""The published judge's."""
FAILED = [-1, -1]
"""What a reply without two scores counts as."""
COCO, WILD = "", "llava_bench_"
"""Prefixes of the names of rules."""
TYPES = ("conv", "detail", "complex")
ALL = "all"
SAME = ("answer1_id", "answer2_id", "category")
"""What a line of a review must have as its question has it."""
DESCRIBED = fields_of(caption=str | Annotated[list[str], MinLen(1)])
BOXED = fields_of(captions=Annotated[list[str], MinLen(1)], instances=list[fields_of(category=str, bbox=list[float])])
"""Lines of contexts, In-the-Wild and COCO."""
RULES = dict[str, fields_of(role=str, prompt=str)]
RULER = "================================="
PUBLISHED = {
    COCO: {
        "COCO: LLaVA 13B, full data": "83.1 75.3 96.5 85.1",
        "COCO: LLaVA 13B, detail + complex": "81.5 73.3 90.8 81.9",
        "COCO: LLaVA 13B, conversation + 5% detail + 10% complex": "81.0 68.4 91.5 80.5",
        "COCO: LLaVA 13B, conversation only": "76.5 59.8 84.9 73.8",
        "COCO: LLaVA 13B, no instruction tuning": "22.0 24.0 18.5 21.5",
    },
    WILD: {
        "In-the-Wild: OpenFlamingo": "19.3 19.0 19.1 19.1",
        "In-the-Wild: BLIP-2": "54.6 29.1 32.9 38.1",
        "In-the-Wild: LLaVA 13B": "57.3 52.5 81.7 67.3",
        "In-the-Wild: LLaVA 13B v1, 336 px, LoRA": "64.3 55.9 81.7 70.1",
        "In-the-Wild: LLaVA 13B v1, 336 px, LoRA, 5 beams": "68.4 59.9 84.3 73.5",
        "In-the-Wild: LLaVA LLaMA-2-13B": "56.7 58.6 80.0 67.9",
        "In-the-Wild: LLaVA 1.5 7B": "- - - 65.4",
        "In-the-Wild: LLaVA 1.5 13B": "- - - 72.5",
    },
}
"""Relative scores by prefix of the rules: conversation, detail, complex, all."""


@dataclass(frozen=True)
class BenchQuestion(VisualQuestion):
    """A line of `questions.jsonl` or `qa90_questions.jsonl`."""

    image: Text
    category: str
    """`conv`, `detail` or `complex`."""


class Comparison(NamedTuple):
    """Two answers to one question: what their line of the review says, and what the judge reads."""

    fields: dict[str, Any]
    """id, question_id, answer1_id, answer2_id, category."""
    message: str


def read_contexts(path: Path) -> dict[str, tuple[str, str]]:
    """What the judge is told of each image, and the prefix of its rules: of `context.jsonl` or `caps_boxes_*.jsonl`."""
    contexts = {}
    for image, record, where in read_lines(path, "image"):
        if "caption" in record:
            said = checked(DESCRIBED, record, where)["caption"]
            contexts[image] = (said if isinstance(said, str) else "\n".join(said), WILD)
        else:
            own = checked(BOXED, record, where)
            boxes = [f"{one['category']}: {one['bbox']}" for one in own["instances"]]
            contexts[image] = ("\n".join([*own["captions"], "", *boxes]), COCO)
    return contexts


def read_comparisons(questions: Path, contexts: Path, rules: Path, reference: Path, answers: Path) -> list[Comparison]:
    """What the judge is to score, in the order of the questions.

    SampleError, which names file and line or question_id, unless both files of answers have each question once, and
    each image and category is known.
    """
    asked, shown = read_questions(questions, BenchQuestion), read_contexts(contexts)
    rule_of = checked(RULES, read_json(rules), rules)
    sides = []
    for path in (reference, answers):
        sides.append(read_answer_lines(path))
        require_same_ids([str(one.question_id) for one in asked], sides[-1], f"{path}, for {questions}: ")
    found = []
    for number, one in enumerate(asked, start=1):
        if one.image not in shown:
            raise SampleError(f"{contexts}: has nothing about the image {one.image} of question {one.question_id}")
        context, prefix = shown[one.image]
        category, pair = prefix + one.category, [side[str(one.question_id)] for side in sides]
        if category not in rule_of:
            raise SampleError(f"{rules}: has no {category!r}, for question {one.question_id}")
        rule = rule_of[category]
        ids = [line.get("answer_id", one.question_id) for line in pair]
        blocks = [f"[Context]\n{context}", f"[Question]\n{one.text}"]
        for place, line in enumerate(pair, start=1):
            name = f"{rule['role']} {place}"
            blocks += [f"[{name}]\n{line['text']}", f"[End of {name}]"]
        blocks.append(f"[System]\n{rule['prompt']}")
        fields = {"id": number, "question_id": one.question_id, "answer1_id": ids[0], "answer2_id": ids[1]}
        found.append(Comparison(fields | {"category": category}, "".join(f"{block}\n\n" for block in blocks)))
    return found


# Judging


def parse_score(reply: str) -> list[float]:
    """The two scores in the first line of a reply, or [-1, -1]: commas count as blanks, and parts end at each blank.
    What a model thinks before its reply is no part of it."""
    parts = (without_thought(reply) if "</think>" in reply else reply).split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return FAILED
    try:
        return [float(part) for part in parts]
    except ValueError:
        return FAILED


def review(judge: Judge, comparisons: Sequence[Comparison], path: Path) -> list[dict[str, Any]]:
    """Have all comparisons scored; the lines of the review, which `path` then holds in the order of the questions.

    A line is written as its reply arrives, and those already in the file stay, whatever their order: only questions
    without one are asked. SampleError where a line is about other answers, ConfigError where the file was made by
    another judge or from other messages; both without a request.
    """
    one = judge.endpoint
    digest = hashlib.sha256("\0".join(comparison.message for comparison in comparisons).encode()).hexdigest()
    made_from = {"judge": one.model, "temperature": one.temperature, "max_tokens": one.max_tokens, "messages": digest}
    beside = path.with_suffix(".made_from.json")
    before = read_facts(beside) if path.exists() else {}
    if other := [name for name in made_from if name in before and before[name] != made_from[name]]:
        raise ConfigError(
            f"--output: {path} was made with other {', other '.join(other)} ({beside.name}); choose another file"
        )
    asked_of, lines = {str(one.fields["question_id"]): one for one in comparisons}, {}
    for line in JsonLines(path).read():
        if line.get("content"):  # without a reply a question is asked again
            key, own = str(line.get("question_id")), asked_of.get(str(line.get("question_id")))
            if own is None or any(line.get(name) != own.fields[name] for name in SAME):
                raise SampleError(
                    f"--output: {path}: question {key}: its line is about other answers; choose another file"
                )
            lines[key] = dict(line)
    write_lines(path, lines.values())  # without what a kill cut off
    write_json(beside, made_from)
    asked: dict[Question, list[str]] = {}
    for key, comparison in asked_of.items():
        if key not in lines:
            asked.setdefault(Question(comparison.message, system=SYSTEM), []).append(key)
    if lines:
        log.info("%s: %d of %d judgements are there already", path, len(lines), len(comparisons))
    for question, reply in judge.ask_each(list(asked)):
        for key in asked[question]:
            lines[key] = asked_of[key].fields | {"content": reply, "tuple": parse_score(reply)}
            with errors_as(RunError, f"--output: cannot write {path}"), path.open("a", encoding="utf-8") as file:
                file.write(json_line(lines[key]))
    ordered = [lines[key] for key in asked_of]
    write_lines(path, ordered)
    return ordered


# Summary


class CategoryScore(NamedTuple):
    """One category of a review. A mean is rounded to 3 places, as published."""

    reference: float
    """Mean score of the reference, most often 1 to 10."""
    candidate: float
    count: int
    interval: tuple[float, float] | None
    """95% interval of the relative score, a bootstrap over questions."""

    @classmethod
    def of(cls, pairs: Sequence[Sequence[float]]) -> "CategoryScore":
        """Of scores of reference and candidate."""
        means = [round(mean, 3) for mean in np.asarray(pairs, dtype=np.float64).mean(axis=0).tolist()]
        ends = ratio_interval(*([pair[side] for pair in pairs] for side in (1, 0)))
        return cls(*means, len(pairs), ends and (100 * ends[0], 100 * ends[1]))

    @property
    def relative(self) -> float | None:
        """100 x the ratio of the means, to 1 place; None for a reference of 0."""
        return round(self.candidate / self.reference * 100, 1) if self.reference else None

    @property
    def shown(self) -> str:
        """The relative score as text."""
        return "-" if self.relative is None else str(self.relative)


class Summary(NamedTuple):
    """A review by category and as a whole."""

    name: str
    scored: dict[str, CategoryScore]
    unread: list[str]
    """Questions whose judgement is no two scores from 1 to 10; the means count it as it stands, -1 for none."""
    read: CategoryScore | None
    """All questions but these."""

    def lines(self) -> list[str]:
        """As the published summariser prints them: category, relative score, both means x 10."""
        rows = [(name, one.shown, one.reference * 10, one.candidate * 10) for name, one in self.scored.items()]
        return [self.name, *(f"{name} {shown} {round(a, 1)} {round(b, 1)}" for name, shown, a, b in rows), RULER]

    def facts(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        scores = {category: {**own._asdict(), "relative": own.relative} for category, own in self.scored.items()}
        return {"scores": scores, "unread": self.unread, "all_without_unread": self.read and self.read.relative}

    def note(self) -> str:
        """How many judgements could not be read."""
        count, bad, read = self.scored[ALL].count, self.unread, self.read
        if not bad:
            return f"{self.name}: {count} judgements, each with two scores from 1 to 10"
        without = f"without them all is {read.relative}" if read else "no judgement is left without them"
        return (
            f"{self.name}: {len(bad)} of {count} judgements are no two scores from 1 to 10 (questions "
            f"{first_few(bad)}); the means count them as they stand, -1 for none; {without}"
        )


def review_name(path: Path) -> str:
    """What a table calls the review in a file."""
    return path.name.replace("gpt4_text_", "").replace(".jsonl", "")


def summarise(path: Path, ignore: Collection[str] = ()) -> Summary:
    """The scores of a review; `ignore`: question ids that are left out. SampleError for a bad line."""
    pairs: dict[str, list[list[float]]] = {ALL: []}
    unread, read = [], []
    for key, record, where in read_lines(path):
        if key in ignore:
            continue
        pair = record.get("tuple", record.get("score"))
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(score) in (int, float) for score in pair):
            raise SampleError(f"{where}: the field 'tuple' must hold two numbers")
        pairs[ALL].append(pair)
        if "category" in record:
            pairs.setdefault(record["category"], []).append(pair)
        if all(1 <= score <= 10 for score in pair):
            read.append(pair)
        else:
            unread.append(key)
    if not pairs[ALL]:
        raise SampleError(f"{path}: holds no judgements")
    scored = {category: CategoryScore.of(own) for category, own in sorted(pairs.items())}
    return Summary(review_name(path), scored, unread, CategoryScore.of(read) if read else None)


def table(summaries: Iterable[Summary]) -> Table:
    """Relative scores with their intervals, and the published ones of the same benchmark below."""
    rows, benchmarks = [], set()
    for own in summaries:
        found = [own.scored.get(category) or own.scored.get(WILD + category) for category in (*TYPES, ALL)]
        ends = [[f"{end:.1f}" for end in one.interval] if one and one.interval else None for one in found]
        rows += with_intervals(own.name, [one.shown if one else "-" for one in found], ends)
        benchmarks |= {WILD if category.startswith(WILD) else COCO for category in own.scored if category != ALL}
    for benchmark in [benchmark for benchmark in PUBLISHED if benchmark in benchmarks]:
        rows += [[f"published, {name}", *cells.split()] for name, cells in PUBLISHED[benchmark].items()]
    return Table(["relative score", "conversation", "detail", "complex", ALL], rows)
