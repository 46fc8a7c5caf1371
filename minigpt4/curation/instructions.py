"""LLaVA's instruction data: a model that reads text alone makes conversations of the captions and boxes of an image.

Source: Liu et al., Visual Instruction Tuning, 2023, section 3. docs/curation.md has the files that come out.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

from minigpt4.common.binding import bind, refuse
from minigpt4.common.config_files import load_yaml, to_plain
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import write_json, write_lines
from minigpt4.conversation.llava import IMAGE_TOKEN, SPEAKERS
from minigpt4.curation.records import CurationFolder, Progress, dropped
from minigpt4.datasets.datasets.llava_conversations import TURNS, require_trainable
from minigpt4.evaluation.caption_data import read_references
from minigpt4.evaluation.failure_rules import FRAGMENT, SENTENCE, SENTENCE_END, find_failures
from minigpt4.evaluation.hallucination import ObjectNames
from minigpt4.evaluation.judge import CUT, EMPTY, Judge, Question, Reply
from minigpt4.evaluation.questions import read_json
from minigpt4.evaluation.yes_no import without_thought

log = logging.getLogger(__name__)

KINDS = {"conversation": 58, "detail": 23, "complex_reasoning": 77}
"""With their shares in the original, thousands of records."""
ENDS = list(accumulate(KINDS.values()))
MOST_CAPTIONS = 5
AGAIN = "\n\n(An answer to this was refused: {}. Answer anew, in the form of the examples.)"
"""Behind a request, the second time."""
LABEL = re.compile(r"(?:^|(?<===))[ \t>*_#]*(question|answer)[ \t]*\d*[*_]*[ \t]*:[*_]*", re.IGNORECASE | re.MULTILINE)
RULE = re.compile(r"={3,}")
OUTSIDE = "text outside the turns"
SHORT = 8
"""Words; an answer of so few may end without a full stop where `===` follows."""
NEGATION = re.compile(r"\b(?:no|not|none|never|nor|neither|without|cannot)\b|n't\b", re.IGNORECASE)
Work = tuple["DescribedImage", dict[str, Any]]
"""An image, and the record that is to be made of it."""


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
    with errors_as(ConfigError, f"{instances}: is not COCO's instances_*.json (images, categories, annotations)"):
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        images = {str(one["id"]): (str(one["file_name"]), one["width"], one["height"]) for one in content["images"]}
        annotations = list(content["annotations"])
    boxes: dict[str, list[tuple[str, list[float]]]] = {key: [] for key in images}
    for number, one in enumerate(annotations, start=1):
        with errors_as(SampleError, f"{instances}: annotation {number} is not a box of a known category and image"):
            _, width, height = images[str(one["image_id"])]
            boxes[str(one["image_id"])].append((names[one["category_id"]], corners(one["bbox"], width, height)))
    told = {key: [" ".join(text.split()) for text in own[:MOST_CAPTIONS]] for key, own in said.items()}
    found = [DescribedImage(key, images[key][0], told[key], boxes[key]) for key in images if key in told]
    if not found:
        raise ConfigError(f"{captions}: has no captions of the images in {instances}; both must be of the same split")
    alone = len(images) + len(said) - 2 * len(found)
    if alone:
        log.warning("%d images are left out, because only one of %s and %s has them", alone, captions, instances)
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
class KindPrompt:
    """A file of prompts: how one kind of instruction is asked for."""

    system: str = ""
    """The system message."""
    examples: list[dict[Literal["context", "answer"], str]] = field(default_factory=list)
    """Turns before the request: others of its kind, with answers that a person wrote."""
    pairs: Literal["several", "one", "none"] = "several"
    """Questions in an answer; `none`: it is an answer alone, to one of `questions`."""
    boxes: bool = True
    """Whether the request shows boxes."""
    questions: list[str] = field(default_factory=list)
    """With `pairs: none`: what people may ask."""
    refused: dict[str, list[str]] = field(default_factory=dict)
    """What no turn may say, in regular expressions by the reason to refuse it, beside those of `refused.yaml`."""
    digest: str = ""
    """Hash of both files."""

    def __post_init__(self) -> None:
        refuse(
            (not self.system.strip(), "system: is empty; it says what is asked for"),
            (any(len(own) < 2 for own in self.examples), "examples: each needs `context` and `answer`"),
            ((self.pairs == "none") != bool(self.questions), "questions: go with `pairs: none`, which needs some"),
        )
        self.system = self.system.strip()

    @cached_property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The examples as a request has them, once for all requests."""
        return tuple((own["context"].strip(), own["answer"].strip()) for own in self.examples)


def read_prompts(folder: Path) -> dict[str, KindPrompt]:
    """`<kind>.yaml` of each kind, with `refused.yaml`; ConfigError for whatever is wrong with one."""
    files = {name: folder / f"{name}.yaml" for name in (*KINDS, "refused")}
    values, found = {name: to_plain(load_yaml(file), str(file)) for name, file in files.items()}, {}
    for kind in KINDS:
        with errors_as(ConfigError, f"{files[kind]}, refused.yaml: `refused` must be lists of regular expressions"):
            refused = values["refused"] | values[kind].get("refused", {})
            for words in chain.from_iterable(refused.values()):
                re.compile(words)
        digest = hashlib.sha256(files[kind].read_bytes() + files["refused"].read_bytes()).hexdigest()[:12]
        own = values[kind] | {"refused": refused, "digest": digest}
        found[kind] = bind(KindPrompt, own, section=kind, source=str(files[kind]))
    return found


def share(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    return int(hashlib.sha256("\0".join(words).encode()).hexdigest()[:13], 16) / 16**13


def kind_of(image: DescribedImage) -> str:
    """The kind of an image, in the shares of the original, whatever other images there are."""
    place = share("kind", image.image_id) * ENDS[-1]
    return next(kind for kind, end in zip(KINDS, ENDS, strict=True) if place < end)


def assign(
    images: Sequence[DescribedImage], prompts: Mapping[str, KindPrompt], counts: Mapping[str, int] | None = None
) -> list[Work]:
    """The records to be made, in an order by hash: one an image, or so many of a kind as `counts` say.

    An image serves a second kind only where no other is left. ConfigError for a count above the number of images.
    """
    chosen = [(kind_of(image), image) for image in images if counts is None]
    used: Counter[str] = Counter()
    for kind, count in (counts or {}).items():
        if count > len(images):
            raise ConfigError(f"--count: {kind}={count}, but there are {len(images)} images")
        ranks = {one.image_id: (used[one.image_id], kind_of(one) != kind, share(kind, one.image_id)) for one in images}
        own = sorted(images, key=lambda one: ranks[one.image_id])[:count]
        chosen += [(kind, image) for image in own]
        used.update(image.image_id for image in own)
    work = []
    for kind, image in chosen:
        prompt, key = prompts[kind], f"{Path(image.file).stem}_{kind}"
        about = {"id": key, "image": image.file, "kind": kind, "context": image.text(prompt.boxes)}
        work.append((image, about | {"prompt": prompt.digest, "refused": [], "tokens_in": 0, "tokens_out": 0}))
    return sorted(work, key=lambda one: share("order", one[1]["id"]))


# What is answered


class RefusedAnswer(ValueError):
    """An answer that nothing can be trained on: the reason, one of a few, and what shows it."""


def read_answer(answer: str, prompt: KindPrompt, key: str) -> list[dict[str, str]]:
    """LLaVA's turns, of what the model wrote for the record `key`; RefusedAnswer.

    `<image>` stands before or after the first question, and a detailed description gets a question, as a hash decides.
    """
    answer = without_thought(answer).replace("\u2019", "'")
    if prompt.pairs == "none":
        pairs, spoken = [(prompt.questions[int(share("question", key) * len(prompt.questions))], answer)], [answer]
        if found := LABEL.search(answer) or RULE.search(answer):
            raise RefusedAnswer(OUTSIDE, found[0])
    else:
        pairs = _blocks(answer)
        spoken = [turn for pair in pairs for turn in pair]
        if (len(pairs) > 1) != (prompt.pairs == "several"):
            raise RefusedAnswer("wrong number of questions", f"{len(pairs)}")
    if len({question.casefold() for question, _ in pairs}) < len(pairs):
        raise RefusedAnswer("a question twice", " ".join(question for question, _ in pairs))
    for reason, phrases in prompt.refused.items():
        if found := re.search(rf"(?<!\w)(?:{'|'.join(phrases)})", "\n".join(spoken), re.IGNORECASE):
            raise RefusedAnswer(reason, found[0])
    for _, text in pairs:
        for failure in find_failures(text, "prose", None):
            if prompt.pairs == "none" or failure.kind != FRAGMENT:  # short answers are
                raise RefusedAnswer(failure.kind, failure.evidence)
    last, closed = pairs[-1][1], answer.endswith("===")
    if not (SENTENCE_END.search(last) or (closed and len(last.split()) <= SHORT)):
        raise RefusedAnswer(FRAGMENT, f"ends in mid-sentence: {last[-40:]}")
    texts = [text for pair in pairs for text in pair]
    turns = [{"from": SPEAKERS[number % 2], "value": text} for number, text in enumerate(texts)]
    turns[0]["value"] = "\n".join((IMAGE_TOKEN, texts[0])[:: 1 if share("place", key) < 0.5 else -1])
    try:
        require_trainable(turns, 1, key)
    except SampleError as error:
        raise RefusedAnswer("cannot be trained on", str(error)) from error
    return turns


def _blocks(answer: str) -> list[tuple[str, str]]:
    """What stands behind `Question:` and `Answer:`, up to `===` or the next of them; words before the first go."""
    _, *parts = LABEL.split(answer)
    labels, texts = [label.lower() for label in parts[::2]], []
    if not labels:
        raise RefusedAnswer("no question and answer", answer[:80])
    for block in parts[1::2]:
        text, *rest = (part.strip() for part in RULE.split(block))
        if any(rest):
            raise RefusedAnswer(OUTSIDE, " ".join(rest)[:80])
        texts.append(text)
    if labels != ["question", "answer"] * (len(labels) // 2):
        raise RefusedAnswer("odd turns", ", ".join(labels))
    if not all(texts):
        raise RefusedAnswer("an empty turn", f"turn {texts.index('') + 1}")
    return list(zip(texts[::2], texts[1::2], strict=True))


def possible_inventions(turns: Sequence[Mapping[str, str]], image: DescribedImage, names: ObjectNames) -> list[str]:
    """Objects that answers name, in sentences without a negation, and neither captions nor boxes of the image."""
    sentences = [own for turn in turns[1::2] for own in SENTENCE.split(turn["value"])]
    affirmed = [own for own in sentences if not NEGATION.search(re.sub(r"^no\W+", "", own, flags=re.IGNORECASE))]
    said = {name for own in affirmed for name in names.mentions(own)}
    given = [*image.captions, *(category for category, _ in image.boxes)]
    return sorted(said.difference(*map(names.mentions, given)))


# Making records


class InstructionGenerator:
    """Asks `judge`, an endpoint whose model reads text, for records, whose files lie in `folder`.

    `review_pile`: `keep` or `leave out` what may be invented; of the files to train on.
    """

    def __init__(
        self, judge: Judge, prompts: Mapping[str, KindPrompt], names: ObjectNames, folder: Path, review_pile: str
    ) -> None:
        self.judge, self.prompts, self.names, self.folder = judge, prompts, names, CurationFolder(folder)
        self.review_pile = review_pile
        self._unusable = Progress(self.folder, "instructions", {})

    def plan(self, work: Sequence[Work]) -> dict[str, Any]:
        """`Judge.plan` of the first requests; as many again come on top at most, for answers that are refused."""
        questions = [self._question(record) for _, record in work]
        return self.judge.plan([one for one in questions if not self._known(one)])

    def make(self, work: Sequence[Work]) -> dict[str, Any]:
        """Write all files; returns the report. RunError where the endpoint can be asked no more: what was answered is
        kept, and the same call goes on."""
        for attempt in range(2):
            asked: dict[Question, list[Work]] = {}
            for image, record in work:
                if len(record["refused"]) == attempt and not record.keys() & {TURNS, "dropped"}:
                    asked.setdefault(self._question(record), []).append((image, record))
            for question, reply in self._replies(asked):
                for image, record in asked[question]:
                    self._take(image, record, reply)
        return self._write([record for _, record in work])

    def _question(self, record: Mapping[str, Any]) -> Question:
        prompt = self.prompts[record["kind"]]
        again = "".join(AGAIN.format(one["reason"]) for one in record["refused"])
        return Question(record["context"] + again, system=prompt.system, examples=prompt.turns)

    def _replies(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Reply]]:
        """Replies as they come; those without use are kept here, as the judge keeps the others."""
        known = {question: self._known(question) for question in questions}
        yield from ((question, Reply(**fields)) for question, fields in known.items() if fields)
        for question, reply in self.judge.try_each([question for question, fields in known.items() if not fields]):
            if reply.fault in (CUT, EMPTY):
                self._unusable.add(reply.key, "", reply._asdict())
            yield question, reply

    def _known(self, question: Question) -> dict[str, Any] | None:
        return self._unusable.get(self.judge.key_of(question), "")

    def _take(self, image: DescribedImage, record: dict[str, Any], reply: Reply) -> None:
        """What a reply makes of a record."""
        record["tokens_in"] += reply.tokens_in or 0
        record["tokens_out"] += reply.tokens_out or 0
        try:
            if reply.fault:
                raise RefusedAnswer(reply.fault, reply.detail or reply.text[-40:])
            turns = read_answer(reply.text, self.prompts[record["kind"]], record["id"])
            invented = possible_inventions(turns, image, self.names)
            record |= {TURNS: turns, "possible_inventions": invented}
            if invented:
                record["review"] = [dropped("instructions", "possible inventions", ", ".join(invented))]
        except RefusedAnswer as error:
            reason, evidence = error.args
            record["refused"].append({"reason": reason, "evidence": evidence, "answer": reply.text})
            if reply.fault not in ("", CUT) or len(record["refused"]) > 1:
                record["dropped"] = dropped("instructions", reason, evidence)

    def _write(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        left_out = {"dropped", "review"} if self.review_pile == "leave out" else {"dropped"}
        for name in (*KINDS, "instruct"):
            own = [one for one in records if name in (one["kind"], "instruct") and not left_out & one.keys()]
            shown = [{key: one[key] for key in ("id", "image", TURNS)} for one in own]
            write_json(self.folder.path / f"{name}.json", shown)
        write_lines(self.folder.path / "review.jsonl", [record for record in records if "review" in record])
        prompts = {kind: prompt.digest for kind, prompt in self.prompts.items()}
        made_from = {"model": self.judge.endpoint.model, "prompts": prompts}
        self.folder.write("instructions", records, made_from)
        kinds = {kind: _counts([record for record in records if record["kind"] == kind]) for kind in KINDS}
        report = {**made_from, "kinds": kinds | {"all": _counts(records)}}
        write_json(self.folder.path / "report.json", report)
        return report


def _counts(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept = [record for record in records if TURNS in record]
    counters = {
        "dropped": Counter(record["dropped"]["rule"] for record in records if "dropped" in record),
        "refused_answers": Counter(one["reason"] for record in records for one in record["refused"]),
        "possible_inventions": Counter(name for record in kept for name in record["possible_inventions"]),
    }
    return {
        "asked": len(records),
        "kept": len(kept),
        "kept_at_second": sum(bool(record["refused"]) for record in kept),
        "to_review": sum("review" in record for record in kept),
        **{name: dict(own.most_common()) for name, own in counters.items()},
        **{name: sum(record[name] for record in records) for name in ("tokens_in", "tokens_out")},
    }
