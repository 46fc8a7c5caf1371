"""LLaVA's instruction data: a model that reads text alone makes conversations of the captions and boxes of an image.

Source: Liu et al., Visual Instruction Tuning, 2023, section 3; `prompts/instructions/` says how each kind is asked for.
In the folder of the output:

    conversation.json, detail.json, complex_reasoning.json    LLaVA's format, a kind each; instruct.json: all of them
    records.jsonl     a line a record, kept or `dropped`: what was asked, refused and answered
    review.jsonl      of these, answers that name objects which neither captions nor boxes know
    report.json       counts of all that
    unusable.jsonl    empty and cut answers, which were paid for, too; the others are in the cache of the endpoint
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minigpt4.common.binding import bind, refuse
from minigpt4.common.config_files import load_yaml
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import JsonLines, write_json
from minigpt4.conversation.llava import IMAGE_TOKEN, SPEAKERS
from minigpt4.datasets.datasets.llava_conversations import TURNS, require_trainable
from minigpt4.evaluation.caption_data import first_few, read_references
from minigpt4.evaluation.failure_rules import FRAGMENT, SENTENCE, SENTENCE_END, find_failures
from minigpt4.evaluation.judge import CUT, EMPTY, Judge, Question, Reply, without_thought
from minigpt4.evaluation.objects import COCO_OBJECTS, MINI_OBJECTS, ObjectNames, read_synonyms
from minigpt4.evaluation.questions import read_json, write_lines
from minigpt4.evaluation.report import Table

log = logging.getLogger(__name__)

KINDS = {"conversation": 58, "detail": 23, "complex_reasoning": 77}
"""With their shares in the original, thousands of records."""
MOST_CAPTIONS = 5
AGAIN = "\n\n(An answer to this was refused: {}. Answer anew, in the form of the examples.)"
"""Behind a request, the second time."""
LABEL = re.compile(r"(?:^|(?<===))[ \t>*_#]*(question|answer)[ \t]*\d*[*_]*[ \t]*:[*_]*", re.IGNORECASE | re.MULTILINE)
RULE = re.compile(r"={3,}")
SHORT = 8
"""Words; a shorter answer may end without a full stop."""
NEGATION = re.compile(r"\b(?:no|not|none|never|nor|neither|without|cannot)\b|n't\b", re.IGNORECASE)


def _any(*phrases: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})", re.IGNORECASE)


SOURCES, NOT_DEFINITE = "it speaks of its sources", "no definite answer"
FORBIDDEN = {
    SOURCES: _any(
        *(r"bounding[- ]?box(?:es)?\b", r"caption(?:s|ed)?\b", r"coordinates\b", r"annotat(?:ions?|ed)\b"),
        r"(?:the|this|these|those|your|given|provided|above) (?:[\w']+ )?(?:descriptions?|sentences)\b",
        r"(?:provided|given|above) (?:text|information|details|context|data)\b",
        r"(?:text|information|details|context|data)(?: that (?:is|are|was|were))? (?:provided|given)\b",
        *(r"as (?:mentioned|stated|described|specified|listed)\b", r"[\[(]\s*[01]?\.\d+\s*,"),
    ),
    "apology or refusal": _any(
        *(
            r"i(?:'m| am) (?:very |so )?sorry\b",
            r"i apologi[sz]e\b",
            r"as an? (?:ai|artificial)\b",
            r"language model\b",
        ),
        r"i (?:cannot|can't|am (?:unable|not able) to|do not|don't) (?:\w+ly )?(?:see|view|access|have access|assist|help)\b",
    ),
    NOT_DEFINITE: _any(
        r"(?:cannot|can't|can not|could not|couldn't|(?:not (?:possible|able)|impossible|difficult|hard|unable|no way) to) "
        r"(?:be )?(?:\w+ly )?(?:tell|told|say|said|know|known|sure|certain|determined?|ascertain(?:ed)?|infer(?:red)?)\b",
        *(r"(?:is|are|remains?) (?:unclear|unknown|uncertain)\b", r"i (?:don't|do not) know\b"),
        r"(?:is|are|am|it's|i'm) not (?:\w+ly )?(?:clear|certain|sure|known|mentioned|specified|stated|indicated)\b",
        *(r"does(?:n't| not) (?:mention|specify|state)\b", r"no (?:\w+ )?(?:information|indication|mention)\b"),
    ),
    "it explains itself": _any(
        r"here(?:'s| is) (?:a|the|my) [^.\n]*\b(?:description|answer|conversation)\b", r"i hope th"
    ),
}
"""What no turn may say, by the reason to refuse it."""

Pair = tuple[str, str]
"""Question and answer."""


# Images, as text


@dataclass(frozen=True)
class DescribedImage:
    """All that the model gets to know of an image."""

    image_id: str
    file: str
    captions: Sequence[str]
    boxes: Sequence[tuple[str, list[float]]]
    """Category, and left, top, right and bottom edge as shares of the picture, three decimals."""

    def text(self, boxes: bool) -> str:
        """A caption a line, and, behind an empty line, `category: [x1, y1, x2, y2]`."""
        lines = [f"{category}: {edges}" for category, edges in self.boxes] if boxes else []
        return "\n".join([*self.captions, *([""] if lines else []), *lines])


def read_images(captions: Path, instances: Path) -> list[DescribedImage]:
    """The images of COCO's two files that have captions, in the order of `instances_*.json`.

    ConfigError for a file in another form, or for two of other images; SampleError that names a bad entry.
    """
    said, content = read_references(captions, "separate"), read_json(instances)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise ConfigError(f"{instances}: needs images, annotations and categories, as COCO's instances_*.json")
    with errors_as(SampleError, f"{instances}: an entry of images or categories is not as COCO's"):
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        images = {str(one["id"]): (str(one["file_name"]), one["width"], one["height"]) for one in content["images"]}
    boxes: dict[str, list[tuple[str, list[float]]]] = {key: [] for key in images}
    for number, one in enumerate(content["annotations"], start=1):
        with errors_as(SampleError, f"{instances}: annotation {number} is no box of a category in one of the images"):
            _, width, height = images[str(one["image_id"])]
            boxes[str(one["image_id"])].append((names[one["category_id"]], corners(one["bbox"], width, height)))
    told = {key: [" ".join(text.split()) for text in own[:MOST_CAPTIONS]] for key, own in said.items()}
    found = [DescribedImage(key, images[key][0], told[key], boxes[key]) for key in images if key in told]
    if not found:
        raise ConfigError(f"{captions}: has no captions of the images in {instances}; take two files of one split")
    alone = len(images) + len(said) - 2 * len(found)
    if alone:
        log.warning("%d images are left out, which only one of %s and %s has", alone, captions, instances)
    return found


def corners(box: Sequence[float], width: float, height: float) -> list[float]:
    """Edges from COCO's left, top, width, height in pixels; ValueError for what is no box."""
    left, top, across, down = box
    edges = [left / width, top / height, (left + across) / width, (top + down) / height]
    if not all(map(math.isfinite, edges)) or min(across, down, width, height) < 0:
        raise ValueError(f"{box} in a picture of {width} x {height}")
    return [round(min(max(edge, 0.0), 1.0), 3) for edge in edges]


# What is asked for


@dataclass
class Example:
    """A request with the answer that a person wrote."""

    context: str = ""
    answer: str = ""


@dataclass
class KindPrompt:
    """A file of prompts: how one kind of instruction is asked for."""

    system: str = ""
    """The system message."""
    examples: list[Example] = field(default_factory=list)
    """Turns before the request."""
    pairs: Literal["several", "one", "none"] = "several"
    """Questions in an answer; `none`: it is an answer alone, to one of `questions`."""
    boxes: bool = True
    """Whether the request shows boxes."""
    questions: list[str] = field(default_factory=list)
    """With `pairs: none`: what people may ask."""
    digest: str = ""
    """Hash of the file."""

    def __post_init__(self) -> None:
        refuse(
            (not self.system.strip(), "system: is empty; it says what is asked for"),
            (any(not (e.context and e.answer) for e in self.examples), "examples: each needs `context` and `answer`"),
            ((self.pairs == "none") != bool(self.questions), "questions: go with `pairs: none`, which needs some"),
        )

    def question(self, image: DescribedImage, refused: str = "") -> Question:
        """The request; `refused`: why an answer to it was."""
        turns = tuple((example.context.strip(), example.answer.strip()) for example in self.examples)
        text = image.text(self.boxes) + (AGAIN.format(refused) if refused else "")
        return Question(text, system=self.system.strip(), examples=turns)


def read_prompts(folder: Path) -> dict[str, KindPrompt]:
    """The prompt of each kind from `<kind>.yaml`; ConfigError for whatever is wrong with one."""
    found = {}
    for kind in KINDS:
        file = folder / f"{kind}.yaml"
        values = {**load_yaml(file), "digest": hashlib.sha256(file.read_bytes()).hexdigest()[:12]}
        found[kind] = bind(KindPrompt, values, section=kind, source=str(file))
    return found


class Order(NamedTuple):
    """One record to be made."""

    image: DescribedImage
    kind: str

    @property
    def key(self) -> str:
        """The id of the record."""
        return f"{Path(self.image.file).stem}_{self.kind}"


def share(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    return int(hashlib.sha256("\0".join(words).encode()).hexdigest()[:13], 16) / 16**13


def kind_of(image: DescribedImage) -> str:
    """The kind of an image, in the shares of the original, whatever other images there are."""
    place = share("kind", image.image_id) * sum(KINDS.values())
    return next(kind for number, kind in enumerate(KINDS, 1) if place < sum(list(KINDS.values())[:number]))


def split_count(total: int) -> dict[str, int]:
    """So many records in the shares of the original."""
    ends = [round(total * sum(list(KINDS.values())[:number]) / sum(KINDS.values())) for number in range(len(KINDS) + 1)]
    return {kind: ends[number + 1] - ends[number] for number, kind in enumerate(KINDS)}


def assign(images: Sequence[DescribedImage], counts: Mapping[str, int] | None = None) -> list[Order]:
    """Which image serves which kind, in an order by hash: each image once, or as often as `counts` make necessary.

    ConfigError where a count is above the number of images: no image has a kind twice.
    """
    orders = [Order(image, kind_of(image)) for image in images] if counts is None else []
    used: Counter[str] = Counter()
    for kind, count in (counts or {}).items():
        if count > len(images):
            raise ConfigError(f"--count: {kind}={count}, but there are {len(images)} images")

        def rank(one: DescribedImage, kind: str = kind) -> tuple[int, bool, float]:
            return used[one.image_id], kind_of(one) != kind, share(kind, one.image_id)

        chosen = sorted(images, key=rank)[:count]
        orders += [Order(image, kind) for image in chosen]
        used.update(image.image_id for image in chosen)
    return sorted(orders, key=lambda order: share("order", order.key))


# What is answered


class RefusedAnswer(ValueError):
    """An answer that nothing can be trained on: the reason, one of a few, and what shows it."""

    def __init__(self, reason: str, evidence: object = "") -> None:
        super().__init__(f"{reason}: {evidence}")
        self.reason, self.evidence = reason, str(evidence)


def read_answer(answer: str, prompt: KindPrompt, key: str) -> list[Pair]:
    """The questions and answers in what the model wrote for the record `key`; RefusedAnswer."""
    answer, alone = without_thought(answer).replace("\u2019", "'"), prompt.pairs == "none"
    if not answer:
        raise RefusedAnswer(EMPTY)
    if alone and (found := LABEL.search(answer) or RULE.search(answer)):
        raise RefusedAnswer("text outside the turns", found[0])
    pairs = (
        [(prompt.questions[int(share("question", key) * len(prompt.questions))], answer)] if alone else _blocks(answer)
    )
    if not alone and (len(pairs) > 1) != (prompt.pairs == "several"):
        raise RefusedAnswer("wrong number of questions", len(pairs))
    if len({question.casefold() for question, _ in pairs}) < len(pairs):
        raise RefusedAnswer("a question twice", pairs[-1][0])
    for turn in (turn for pair in pairs for turn in pair):
        for reason, phrases in FORBIDDEN.items():
            if found := phrases.search(turn):
                raise RefusedAnswer(reason, found[0])
    for _, text in pairs:
        for failure in find_failures(text, "prose", None):
            if alone or failure.kind != FRAGMENT:  # short answers are
                raise RefusedAnswer(failure.kind, failure.evidence)
    if len((last := pairs[-1][1]).split()) > SHORT and not SENTENCE_END.search(last):
        raise RefusedAnswer(FRAGMENT, f"ends in mid-sentence: {last[-40:]}")
    try:
        require_trainable(turns_of(pairs, key), 1, key)
    except SampleError as error:
        raise RefusedAnswer("cannot be trained on", error) from error
    return pairs


def _blocks(answer: str) -> list[Pair]:
    """What stands behind `Question:` and `Answer:`, up to `===` or the next of them; words before the first go."""
    _, *parts = LABEL.split(answer)
    labels, texts = [label.lower() for label in parts[::2]], []
    if not labels:
        raise RefusedAnswer("no question and answer", answer[:80])
    for block in parts[1::2]:
        text, *rest = (part.strip() for part in RULE.split(block))
        if any(rest):
            raise RefusedAnswer("text outside the turns", " ".join(rest)[:80])
        texts.append(text)
    if labels != ["question", "answer"] * (len(labels) // 2):
        raise RefusedAnswer("odd turns", ", ".join(labels))
    if not all(texts):
        raise RefusedAnswer("an empty turn", texts.index("") + 1)
    return list(zip(texts[::2], texts[1::2], strict=True))


def turns_of(pairs: Sequence[Pair], key: str) -> list[dict[str, str]]:
    """LLaVA's turns; `<image>` stands before or after the first question, which a hash decides."""
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(SPEAKERS, pair, strict=True)]
    turns[0]["value"] = "\n".join((IMAGE_TOKEN, turns[0]["value"])[:: 1 if share("place", key) < 0.5 else -1])
    return turns


def possible_inventions(pairs: Sequence[Pair], image: DescribedImage, names: ObjectNames) -> list[str]:
    """Objects that answers name, in sentences without a negation, and neither captions nor boxes of the image."""
    sentences = [re.sub(r"^no\W+", "", one, flags=re.I) for _, text in pairs for one in SENTENCE.split(text)]
    said = {name for one in sentences if not NEGATION.search(one) for name in names.mentions(one)}
    given = [*image.captions, *(category for category, _ in image.boxes)]
    return sorted(said.difference(*map(names.mentions, given)))


def read_names(images: Sequence[DescribedImage], synonyms: Path | None = None) -> ObjectNames:
    """Names of objects: of a file as `read_synonyms` reads it, or COCO's, or the mini world's; ConfigError if one of
    the categories is not among them."""
    categories = {category for image in images for category, _ in image.boxes}
    for file in [synonyms] if synonyms else [COCO_OBJECTS, MINI_OBJECTS]:
        names = read_synonyms(file)
        if all(map(names.name_of, categories)):
            return names
    unknown = first_few(sorted(name for name in categories if not names.name_of(name)))
    raise ConfigError(f"--synonyms: {file} lacks {unknown}; give a file with a line an object, `name, synonym, ...`")


# Making records


@dataclass
class Made:
    """What came of an order so far."""

    order: Order
    pairs: list[Pair] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    """Of each answer without use: reason, evidence, answer."""
    fault: str = ""
    """Why the endpoint gave no answer."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    """Sent and come back, as the endpoint counts them."""


class Maker:
    """Asks `judge`, an endpoint whose model reads text, for records, whose files lie in `folder`."""

    def __init__(self, judge: Judge, prompts: Mapping[str, KindPrompt], names: ObjectNames, folder: Path) -> None:
        with errors_as(ConfigError, f"--output: cannot write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        self.judge, self.prompts, self.names, self.folder = judge, prompts, names, folder
        self._file = JsonLines(folder / "unusable.jsonl")
        self._unusable = {line["key"]: Reply(**line) for line in self._file.read()}

    def plan(self, orders: Sequence[Order]) -> dict[str, Any]:
        """`Judge.plan` of the first requests; as many again come on top at most, for answers that are refused."""
        questions = [self._question(Made(order)) for order in orders]
        return self.judge.plan([one for one in questions if self.judge.key_of(one) not in self._unusable])

    def make(self, orders: Sequence[Order]) -> dict[str, Any]:
        """Write all files; returns the report. RunError where the endpoint can be asked no more: what was answered is
        kept, and the same call goes on."""
        made = [Made(order) for order in orders]
        for attempt in range(2):
            asked: dict[Question, list[Made]] = {}
            for one in made:
                if len(one.refused) == attempt and not one.pairs and not one.fault:
                    asked.setdefault(self._question(one), []).append(one)
            for question, reply in self._replies(asked):
                for one in asked[question]:
                    self._take(one, reply)
        return self._write([self._record(one) for one in made])

    def _question(self, one: Made) -> Question:
        reason = one.refused[-1]["reason"] if one.refused else ""
        return self.prompts[one.order.kind].question(one.order.image, reason)

    def _replies(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Reply]]:
        """Replies as they come; those without use are kept here."""
        known = {question: self._unusable.get(self.judge.key_of(question)) for question in questions}
        yield from ((question, reply) for question, reply in known.items() if reply)
        for question, reply in self.judge.try_each([question for question, reply in known.items() if not reply]):
            if reply.fault in (CUT, EMPTY):
                self._file.append(reply._asdict())
            yield question, reply

    def _take(self, one: Made, reply: Reply) -> None:
        one.tokens = [sum(pair) for pair in zip(one.tokens, (reply.tokens_in or 0, reply.tokens_out or 0), strict=True)]
        if reply.fault not in ("", CUT, EMPTY):
            one.fault = reply.fault
            return
        try:
            if reply.fault:
                raise RefusedAnswer(reply.fault)
            one.pairs = read_answer(reply.text, self.prompts[one.order.kind], one.order.key)
        except RefusedAnswer as error:
            one.refused.append({"reason": error.reason, "evidence": error.evidence, "answer": reply.text})

    def _record(self, one: Made) -> dict[str, Any]:
        """A line of `records.jsonl`."""
        (image, kind), prompt = one.order, self.prompts[one.order.kind]
        about = {"id": one.order.key, "image": image.file, "kind": kind, "context": image.text(prompt.boxes)}
        about |= {"model": self.judge.endpoint.model, "prompt": prompt.digest, "refused": one.refused}
        about |= {"tokens_in": one.tokens[0], "tokens_out": one.tokens[1]}
        if one.pairs:
            invented = possible_inventions(one.pairs, image, self.names)
            return about | {TURNS: turns_of(one.pairs, one.order.key), "possible_inventions": invented}
        last = {"reason": one.fault, "evidence": "no answer"} if one.fault else one.refused[-1]
        return about | {"dropped": {"step": "instructions", "rule": last["reason"], "evidence": last["evidence"]}}

    def _write(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        kept = [record for record in records if TURNS in record]
        for name in (*KINDS, "instruct"):
            own = [record for record in kept if name in (record["kind"], "instruct")]
            write_json(self.folder / f"{name}.json", [{key: one[key] for key in ("id", "image", TURNS)} for one in own])
        write_lines(self.folder / "records.jsonl", records)
        write_lines(self.folder / "review.jsonl", [record for record in kept if record["possible_inventions"]])
        counts = {kind: _counts([record for record in records if record["kind"] == kind]) for kind in KINDS}
        prompts = {kind: prompt.digest for kind, prompt in self.prompts.items()}
        report = {"model": self.judge.endpoint.model, "prompts": prompts, "kinds": counts | {"all": _counts(records)}}
        write_json(self.folder / "report.json", report)
        return report


def _counts(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept = [record for record in records if TURNS in record]
    counters = {
        "dropped": Counter(record["dropped"]["rule"] for record in records if TURNS not in record),
        "refused_answers": Counter(one["reason"] for record in records for one in record["refused"]),
        "possible_inventions": Counter(name for record in kept for name in record["possible_inventions"]),
    }
    return {
        "asked": len(records),
        "kept": len(kept),
        "kept_at_second": sum(bool(record["refused"]) for record in kept),
        "to_review": sum(bool(record["possible_inventions"]) for record in kept),
        **{name: dict(sorted(own.items(), key=lambda one: (-one[1], one[0]))) for name, own in counters.items()},
        **{name: sum(record[name] for record in records) for name in ("tokens_in", "tokens_out")},
    }


def table(report: Mapping[str, Any]) -> Table:
    """A line a kind, and one for all."""
    names = ("asked", "kept", "kept_at_second", "to_review")
    rows = []
    for kind, own in report["kinds"].items():
        dropped = ", ".join(f"{count} {rule}" for rule, count in own["dropped"].items())
        rows.append([kind, *(str(own[name]) for name in names), dropped or "0"])
    return Table(["kind", *(name.replace("_", " ") for name in names), "dropped"], rows)
