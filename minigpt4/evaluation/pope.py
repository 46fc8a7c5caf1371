"""Questions about objects from configuration to scores: `eval_hallucination.py pope` in steps."""

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.text import LINE_END, decode, parse_json
from minigpt4.common.utils import write_json
from minigpt4.evaluation.bootstrap import wilson
from minigpt4.evaluation.chair import Truth
from minigpt4.evaluation.generate import NamedCheckpoint, PredictionRun, batch_size, setup_metadata
from minigpt4.evaluation.report import Table, score_table
from minigpt4.inference.image_list import ImageFile, ImageList
from minigpt4.inference.pipeline import image_processor
from minigpt4.inference.prompts import PromptRules
from minigpt4.models.feature_cache import feature_cache
from minigpt4.models.generation import Answer

log = logging.getLogger(__name__)


# Yes or no in answers that people and models write. What is neither is None, and never taken for one of the two.


THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL | re.IGNORECASE)
WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
FIRST = re.compile(r"\W*(yes|no|yeah|yep|nope)\b", re.IGNORECASE)
NUMBERED = re.compile(r"\W*(?:caption|line|number)?\W*(\d+)\W+(yes|no)\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")
UNSURE = re.compile(
    r"\b(?:not (?:sure|certain|clear|possible|able)|unsure|unclear|cannot (?:tell|say|determine)|"
    r"(?:can't|can not|don't|do not) (?:tell|say|know|determine)|maybe|perhaps|possibly|might|may be|sorry)\b"
)
SHOWS = r"(?:show|have|has|contain|feature|include|depict|see)s?"
DENIAL = re.compile(
    rf"\bthere (?:is|are|was|were)(?: no| not|n't)\b|\bthere's (?:no|not)\b|\b{SHOWS} (?:no|not)\b|"
    rf"\b(?:does not|doesn't|do not|don't|cannot|can't|can not) (?:\w+ )?(?:{SHOWS}|appear)\b"
)
AFFIRMATION = re.compile(
    rf"\bthere(?: is| are|'s)\b|\bi (?:can )?see\b|\b(?:image|picture|photo|scene) (?:\w+ )?{SHOWS}\b"
)


def yes_no(answer: str) -> bool | None:
    """Whether an answer says yes.

    By its first word; else by the one of `yes` and `no` that its first sentence holds; else by a statement such as
    `there is no dog` or `I see a dog`. None for what is unsure, contradicts itself or speaks of other things.
    """
    answer = _without_thought(answer).replace("\u2019", "'")
    if first := FIRST.match(answer):
        return first[1].lower().startswith("y")
    sentence = SENTENCE_END.split(answer, maxsplit=1)[0].lower()
    if UNSURE.search(sentence):
        return None
    said = set(WORD.findall(sentence))
    if DENIAL.search(sentence):
        return None if "yes" in said else False
    affirms = AFFIRMATION.search(sentence) is not None
    if len(said) == 1:
        return True if said == {"yes"} else None if affirms else False
    return True if not said and affirms else None


def yes_no_lines(answer: str, count: int) -> list[bool] | None:
    """`count` answers, one a line as `1. yes`, as `yes`, or all in one line; None unless there are exactly so many.

    Numbered lines may have words of explanation behind them, and any order.
    """
    lines = [line for line in _without_thought(answer).splitlines() if line.strip()]
    numbered = [(int(found[1]), found[2]) for line in lines if (found := NUMBERED.match(line))]
    if len(numbered) > 1 or count == 1 == len(numbered):
        by_number = dict(numbered)
        whole = len(numbered) == len(by_number) and by_number.keys() == set(range(1, count + 1))
        return _are_yes([by_number[number] for number in range(1, count + 1)]) if whole else None
    plain = [found[1] for line in lines if (found := re.match(r"\W*(yes|no)\b", line, re.IGNORECASE))]
    if len(plain) == count:
        return _are_yes(plain)
    words = WORD.findall(_without_thought(answer))
    return _are_yes(words) if len(words) == count else None


def _without_thought(answer: str) -> str:
    """The answer of a model that thinks aloud first."""
    return THOUGHT.sub("", answer).strip()


def _are_yes(words: Sequence[str]) -> list[bool]:
    return [word.lower() == "yes" for word in words]


# Yes-or-no questions about objects that are there and objects that are not, as in POPE.
#
# Source: Li et al., Evaluating Object Hallucination in Large Vision-Language Models, 2023. Files, a line a question:
#
#     questions   {"question_id": 1, "image": "42.jpg", "text": "Is there a dog in the image?", "label": "yes"}
#     answers     {"question_id": 1, "answer": "Yes, there is."}


Negatives = Literal["random", "popular", "adversarial"]
NEGATIVES: tuple[Negatives, ...] = ("random", "popular", "adversarial")
ARE_PLURAL = ("skis", "scissors")
YES, NO = "yes", "no"
ANSWER_FIELDS = ("answer", "text")
SHOWN = 3


@dataclass(frozen=True)
class ObjectQuestion:
    """A line of a file of questions."""

    question_id: int | str
    image: str
    text: str
    label: str
    """`yes` or `no`."""


def make_questions(
    truth: Truth,
    negatives: Negatives,
    *,
    pairs: int = 3,
    least_objects: int = 1,
    images: int | None = None,
    seed: int = 0,
    suffix: str = ".jpg",
) -> list[ObjectQuestion]:
    """As many questions about objects that are there as about others, for every image.

    Args:
        negatives: which objects that are not there: `random`: any; `popular`: those that most images have;
            `adversarial`: those that are most often together with the objects of this image.
        pairs: questions of each of the two kinds an image, fewer where it has fewer objects.
        least_objects: images with fewer objects are left out.
        images: draw so many of the others; None: all.
        suffix: of image files, where the truth does not name them: id + suffix.

    Raises:
        ConfigError: there are not so many images with so many objects.
    """
    if pairs < 1:
        raise ConfigError(f"--pairs: {pairs} must be at least 1")
    random = np.random.Generator(np.random.PCG64(seed))
    rank = _Ranking(truth, negatives, random)
    questions: list[ObjectQuestion] = []
    for image_id in _drawn(truth, max(1, least_objects), images, random):
        there = sorted(truth.objects[image_id])
        asked = random.permutation(there)[:pairs].tolist()
        file = truth.files.get(image_id, image_id + suffix)
        for one, other in zip(asked, rank.absent(there), strict=False):  # few objects, or few others
            for name, label in ((one, YES), (other, NO)):
                questions.append(ObjectQuestion(len(questions) + 1, file, question_text(name), label))
    return questions


def _drawn(truth: Truth, least_objects: int, images: int | None, random: np.random.Generator) -> list[str]:
    """Ids of the images to ask about, in the order of the truth."""
    fit = [image_id for image_id, own in truth.objects.items() if len(own) >= least_objects]
    if len(fit) < (images or 1):
        raise ConfigError(
            f"{len(fit)} images have {least_objects} objects or more, {images or 1} are needed; see --least-objects"
        )
    if images is None:
        return fit
    return [fit[place] for place in sorted(random.choice(len(fit), size=images, replace=False))]


class _Ranking:
    """Objects that an image does not show, the ones to ask about first."""

    def __init__(self, truth: Truth, negatives: Negatives, random: np.random.Generator) -> None:
        self._names, self._negatives, self._random = truth.names.names, negatives, random
        self._frequency = Counter(name for own in truth.objects.values() for name in own)
        self._together = Counter(pair for own in truth.objects.values() for pair in permutations(sorted(own), 2))

    def absent(self, there: Sequence[str]) -> list[str]:
        """Of equals the one that stands first in the list of names goes first."""
        others = [name for name in self._names if name not in there]
        if self._negatives == "random":
            return self._random.permutation(others).tolist()
        if self._negatives == "popular":
            return sorted(others, key=lambda name: -self._frequency[name])
        return sorted(
            others, key=lambda name: (-sum(self._together[one, name] for one in there), -self._frequency[name])
        )


def question_text(name: str) -> str:
    """`Is there a dog in the image?`"""
    if name in ARE_PLURAL:
        return f"Are there any {name} in the image?"
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def read_questions(path: Path) -> list[ObjectQuestion]:
    """The questions of a file; SampleError that names the line of a bad one, or of an id that comes twice."""
    questions: dict[str, ObjectQuestion] = {}
    for record, where in _records(path):
        own = {name: record.get(name) for name in ("question_id", "image", "text", "label")}
        missing = [name for name, value in own.items() if not isinstance(value, int | str) or value == ""]
        if missing:
            raise SampleError(f"{where}: the field {missing[0]!r} must be text or a number")
        label = str(own["label"]).strip().lower()
        if label not in (YES, NO):
            raise SampleError(f"{where}: the field 'label' must be 'yes' or 'no'; it is {own['label']!r}")
        key = str(own["question_id"])
        if key in questions:
            raise SampleError(f"{where}: the question_id {key} comes twice")
        questions[key] = ObjectQuestion(own["question_id"], str(own["image"]), str(own["text"]), label)
    if not questions:
        raise SampleError(f"{path}: holds no questions")
    return list(questions.values())


def read_answers(path: Path) -> dict[str, str]:
    """Answers by question_id as text; SampleError that names the line of a bad one, or of a second answer."""
    answers: dict[str, str] = {}
    for record, where in _records(path):
        answer = next((record[name] for name in ANSWER_FIELDS if isinstance(record.get(name), str)), None)
        if answer is None or not isinstance(record.get("question_id"), int | str):
            raise SampleError(f"{where}: an answer needs 'question_id' and the text 'answer'")
        key = str(record["question_id"])
        if key in answers:
            raise SampleError(f"{where}: the question {key} has an answer already")
        answers[key] = answer
    return answers


def write_lines(path: Path, records: Iterable[Mapping[str, Any] | ObjectQuestion]) -> None:
    """JSON lines; ConfigError if the disk refuses."""
    rows = [asdict(record) if isinstance(record, ObjectQuestion) else record for record in records]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def score(questions: Sequence[ObjectQuestion], answers: Mapping[str, str]) -> dict[str, Any]:
    """Scores of the answers, shares from 0 to 1; None where there is nothing to divide by.

    An answer that is neither yes nor no is wrong for `accuracy` and `recall`, no yes for `precision` and `yes share`,
    and listed by its question's id.

    Raises:
        SampleError: a question has no answer, or an answer no question.
    """
    _match(questions, answers)
    said = {str(q.question_id): yes_no(answers[str(q.question_id)]) for q in questions}
    pairs = [(q.label == YES, said[str(q.question_id)]) for q in questions]
    right = sum(is_yes is answer for is_yes, answer in pairs)
    hits = sum(is_yes and answer is True for is_yes, answer in pairs)
    yes_said, yes_true = sum(answer is True for _, answer in pairs), sum(is_yes for is_yes, _ in pairs)
    shares = {
        "accuracy": (right, len(pairs)),
        "precision": (hits, yes_said),
        "recall": (hits, yes_true),
        "yes share": (yes_said, len(pairs)),
    }
    scores = {name: part / whole if whole else None for name, (part, whole) in shares.items()}
    scores["F1"] = 2 * hits / (yes_said + yes_true) if yes_said + yes_true else None
    return {
        "scores": scores,
        "intervals": {name: wilson(part, whole) for name, (part, whole) in shares.items() if whole},
        "questions": len(pairs),
        "unparsable": [key for key, answer in said.items() if answer is None],
    }


def _match(questions: Sequence[ObjectQuestion], answers: Mapping[str, str]) -> None:
    ids = {str(question.question_id) for question in questions}
    missing = [str(q.question_id) for q in questions if str(q.question_id) not in answers]
    unknown = [key for key in answers if key not in ids]
    for wrong, what in ((missing, "questions have no answer"), (unknown, "answers have no question")):
        if wrong:
            shown = ", ".join(wrong[:SHOWN]) + (", ..." if len(wrong) > SHOWN else "")
            raise SampleError(f"{len(wrong)} {what}: question_id {shown}")


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The lines of a file and their places, whatever the file is called: published ones are called .json."""
    with errors_as(ConfigError, f"{path}: cannot be read"):
        lines = LINE_END.split(decode(path.read_bytes()))
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line) if line.strip() else None
        except ValueError as error:
            raise SampleError(f"{where}: not JSON ({error}); the file must hold an object a line") from error
        if record is not None:
            if not isinstance(record, dict):
                raise SampleError(f"{where}: not an object with named fields")
            yield record, where


QUESTION_PLACE = "{}"
PROMPT = f"<Img><ImageHere></Img> {QUESTION_PLACE} Answer with yes or no."
METRICS = ("accuracy", "precision", "recall", "F1", "yes share")


@dataclass(frozen=True)
class PopeRun:
    """What is asked of which checkpoints."""

    cfg: Config
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
    predictions = PredictionRun(
        run.cfg, items, items.batches(batch_size(run.cfg)), [rules], run.checkpoints, run.folder
    )
    said = predictions.answers(processes)
    if said is None:
        return None
    setup = setup_metadata(run.cfg, dataclasses.replace(rules, own_prompts={}))
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
