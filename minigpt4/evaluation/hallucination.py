"""Objects that are named but not there: CHAIR of captions, and yes-or-no questions as in POPE.

Sources: Rohrbach et al., Object Hallucination in Image Captioning, 2018; Li et al., Evaluating Object Hallucination in
Large Vision-Language Models, 2023.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import LINE_END, decode, parse_json, write_json
from minigpt4.evaluation.bootstrap import ratio_interval, wilson
from minigpt4.evaluation.caption_data import first_few
from minigpt4.evaluation.generate import NamedCheckpoint, batch_size, predict, setup_metadata
from minigpt4.evaluation.judge import yes_no
from minigpt4.evaluation.report import Table, score_table
from minigpt4.inference.image_list import ImageFile, ImageList
from minigpt4.inference.pipeline import PromptRules, image_processor
from minigpt4.models.feature_cache import feature_cache
from minigpt4.models.generation import Answer

log = logging.getLogger(__name__)

COCO_OBJECTS = Path(__file__).with_name("coco_objects.txt")
MINI_OBJECTS = Path(__file__).with_name("mini_objects.txt")
IRREGULAR = {
    "calf": "calves",
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "half": "halves",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "scarf": "scarves",
    "shelf": "shelves",
    "tooth": "teeth",
    "wife": "wives",
    "wolf": "wolves",
}
NO_OBJECT = ""
Words = tuple[str, ...]
Negatives = Literal["random", "popular", "adversarial"]
NEGATIVES: tuple[Negatives, ...] = ("random", "popular", "adversarial")
ARE_PLURAL = ("skis", "scissors")
YES, NO = "yes", "no"
ANSWER_FIELDS = ("answer", "text")
QUESTION_PLACE = "{}"
PROMPT = f"<Img><ImageHere></Img> {QUESTION_PLACE} Answer with yes or no."
POPE_METRICS = ("accuracy", "precision", "recall", "F1", "yes share")


# Objects that a text names


class ObjectNames:
    """Objects and their synonyms.

    Args:
        synonyms: what else each object is called, by its name.
        others: words that name none of them.

    Raises:
        ConfigError: one word names two objects.
    """

    def __init__(self, synonyms: Mapping[str, Sequence[str]], others: Iterable[str] = ()) -> None:
        self.names = list(synonyms)
        self._of: dict[Words, str] = {}
        for name, more in synonyms.items():
            for phrase in (name, *more):
                self._add(phrase, name)
        for phrase in others:
            self._add(phrase, NO_OBJECT)
        self._longest = max(map(len, self._of), default=0)

    def _add(self, phrase: str, name: str) -> None:
        words = _words(phrase)
        if not words:
            raise ConfigError(f"synonyms: {phrase!r} of {name!r} has no words")
        if self._of.setdefault(words, name) != name:
            raise ConfigError(f"synonyms: {phrase!r} is in two lines, of {self._of[words]!r} and {name!r}")
        for last in plurals(words[-1]):
            self._of.setdefault((*words[:-1], last), name)

    def mentions(self, text: str) -> list[str]:
        """The object of every mention, in the order of the text; of words that overlap, the longest count."""
        words, found, start = _words(text), [], 0
        while start < len(words):
            length = next((n for n in range(self._longest, 0, -1) if words[start : start + n] in self._of), 0)
            name = self._of[words[start : start + length]] if length else NO_OBJECT
            if name:
                found.append(name)
            start += max(length, 1)
        return found

    def name_of(self, phrase: str) -> str | None:
        """The name of the object that a whole phrase names."""
        return self._of.get(_words(phrase)) or None


def plurals(word: str) -> set[str]:
    """What the plural of a word may be; for regular ones more than one where spelling has no rule."""
    if word in IRREGULAR:
        return {IRREGULAR[word], word + "s"}
    if word.endswith("man"):
        return {word[:-3] + "men"}
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return {word[:-1] + "ies"}
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return {word + "es"}
    return {word + "s", word + "es"} if word.endswith("o") else {word + "s"}


def read_synonyms(path: Path) -> ObjectNames:
    """The names of a text file with a line an object, `dog: puppy, hound` or `dog, puppy, hound`, its name first.

    A line that begins with `-` holds words that name no object (`- dog house`); `#` begins a comment. ConfigError if
    the file cannot be read, or says two things of one word.
    """
    with errors_as(ConfigError, f"{path}: cannot be read as a list of synonyms"):
        lines = decode(path.read_bytes()).splitlines()
    synonyms: dict[str, list[str]] = {}
    others: list[str] = []
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        phrases = [phrase.strip() for phrase in re.split(r"[:,]", line.removeprefix("-")) if phrase.strip()]
        if line.startswith("-"):
            others += phrases
        elif phrases and phrases[0] in synonyms:
            raise ConfigError(f"{path}, line {number}: the object {phrases[0]!r} has a line already")
        elif phrases:
            synonyms[phrases[0]] = phrases[1:]
    if not synonyms:
        raise ConfigError(f"{path}: names no object; a line an object, `name, synonym, synonym`")
    try:
        return ObjectNames(synonyms, others)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _words(text: str) -> Words:
    """Words in small letters, without hyphens and possessive endings."""
    return tuple(re.findall(r"[^\W_]+", re.sub(r"['\u2019]s\b", "", text.lower())))


# Objects that images show


@dataclass(frozen=True)
class Truth:
    """The objects of every image, under the names of `names`."""

    objects: Mapping[str, frozenset[str]]
    names: ObjectNames
    files: Mapping[str, str] = field(default_factory=dict)
    """Image files by image id, where the file of the truth knows them."""

    def with_captions(self, captions: Mapping[str, Sequence[str]]) -> "Truth":
        """The same, and the objects that people named in their captions of the image.

        Raises SampleError for an image without captions: it would be judged more strictly than the others.
        """
        missing = [image_id for image_id in self.objects if image_id not in captions]
        if missing:
            some = first_few(map(repr, missing))
            raise SampleError(f"{len(missing)} of {len(self.objects)} images have no captions: {some}")
        said = {image_id: self.names.mentions("\n".join(captions[image_id])) for image_id in self.objects}
        return Truth({key: own | frozenset(said[key]) for key, own in self.objects.items()}, self.names, self.files)

    def only(self, image_ids: Iterable[str]) -> "Truth":
        """The truth of these images alone."""
        return Truth({key: self.objects[key] for key in image_ids}, self.names, self.files)


def read_truth(path: Path, synonyms: Path | None = None) -> Truth:
    """What the images show, from a file in one of three forms; image ids are compared as text.

        objects       {"42": ["dog", "cup"], ...}, also as {"42": {"objects": [...], "file": "42.png"}}
        COCO          instances_val2014.json: categories, images, annotations
        mini world    scenes_test.json, which the quickstart draws

    Args:
        synonyms: names of the objects; without, those of the mini world for its scenes, else of COCO.

    Raises:
        ConfigError: a file cannot be read, or holds no truth, or names of objects that are not in the list.
        SampleError: an entry is bad.
    """
    with errors_as(ConfigError, f"{path}: cannot be read"):
        text = path.read_bytes()
    with errors_as(ConfigError, f"{path}: not JSON"):
        content = parse_json(text)
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: expected {{"image id": ["object", ...]}}, or COCO\'s instances')
    if "categories" in content and "annotations" in content:
        objects, files, default = *_coco(content, path), COCO_OBJECTS
    elif any(isinstance(entry, dict) and "groups" in entry for entry in content.values()):
        objects, files, default = _scenes(content, path), {}, MINI_OBJECTS
    else:
        objects, files, default = *_lists(content, path), COCO_OBJECTS
    if not objects:
        raise ConfigError(f"{path}: holds no image")
    names = read_synonyms(synonyms or default)
    return Truth(_named(objects, names, path), names, files)


def _coco(content: Mapping[str, Any], path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = content.get("images", [])
        objects: dict[str, list[str]] = {str(image["id"]): [] for image in images}
        files = {str(image["id"]): image["file_name"] for image in images if "file_name" in image}
        for annotation in content["annotations"]:
            objects.setdefault(str(annotation["image_id"]), []).append(names[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise SampleError(f"{path}: an entry of COCO's instances lacks {error}; is it a file of captions?") from error
    return objects, files


def _scenes(content: Mapping[str, Any], path: Path) -> dict[str, list[str]]:
    try:
        return {key: [group["thing"] for group in scene["groups"]] for key, scene in content.items()}
    except (KeyError, TypeError) as error:
        raise SampleError(f"{path}: a scene lacks {error}; draw the mini world again") from error


def _lists(content: Mapping[str, Any], path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    objects, files = {}, {}
    for image_id, entry in content.items():
        own = entry.get("objects") if isinstance(entry, dict) else entry
        if not isinstance(own, list) or not all(isinstance(name, str) for name in own):
            raise SampleError(f"{path}: image {image_id}: expected a list of names of objects, not {entry!r:.80}")
        objects[image_id] = own
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            files[image_id] = entry["file"]
    return objects, files


def _named(objects: Mapping[str, list[str]], names: ObjectNames, path: Path) -> dict[str, frozenset[str]]:
    known: dict[str, str | None] = {name: names.name_of(name) for own in objects.values() for name in own}
    unknown = sorted(name for name, found in known.items() if found is None)
    if unknown:
        raise ConfigError(
            f"{path}: {len(unknown)} of its objects are not in the list of names: {first_few(map(repr, unknown))}; "
            "give --synonyms a file with a line an object: `name, synonym, synonym`"
        )
    return {key: frozenset(known[name] for name in own) for key, own in objects.items()}


# CHAIR


@dataclass(frozen=True)
class ImageObjects:
    """One caption beside its image."""

    mentions: list[str]
    """The object of every mention, in order."""

    shown: frozenset[str]
    """Objects of the image."""

    words: int

    @property
    def named(self) -> set[str]:
        return set(self.mentions)

    @property
    def wrong(self) -> list[str]:
        """Mentions of objects that are not there."""
        return [name for name in self.mentions if name not in self.shown]


def compare(captions: Mapping[str, str], truth: Truth) -> dict[str, ImageObjects]:
    """Every caption beside what its image shows; KeyError for an image that the truth does not know."""
    return {
        image_id: ImageObjects(truth.names.mentions(text), truth.objects[image_id], len(text.split()))
        for image_id, text in captions.items()
    }


def chair_scores(images: Mapping[str, ImageObjects]) -> dict[str, Any]:
    """Scores of all captions, shares from 0 to 1 (None where there is nothing to divide by), with intervals and counts.

    `CHAIR-i`: of the mentions, those of objects that are not there. `CHAIR-s`: of the captions, those with such a
    mention. `CHAIR-i (once)` counts an object once a caption, however often it is mentioned. `recall`: of the
    objects that are there, those that are named. `F1`: harmonic mean of recall and 1 - `CHAIR-i (once)`.
    `words`: mean length of a caption. The intervals are 95%, over images.
    """
    rows = list(images.values())
    mentions, wrong = [len(row.mentions) for row in rows], [len(row.wrong) for row in rows]
    named, hits = [len(row.named) for row in rows], [len(row.named & row.shown) for row in rows]
    misses = [names - right for names, right in zip(named, hits, strict=True)]
    shown, bad, ones = [len(row.shown) for row in rows], sum(map(bool, wrong)), [1] * len(rows)
    ratios = {
        "CHAIR-i": (wrong, mentions),
        "CHAIR-s": ([int(count > 0) for count in wrong], ones),
        "CHAIR-i (once)": (misses, named),
        "recall": (hits, shown),
        "F1": ([2 * n for n in hits], [n + m for n, m in zip(named, shown, strict=True)]),
        "words": ([row.words for row in rows], ones),
    }
    scores = {name: sum(part) / sum(whole) if sum(whole) else None for name, (part, whole) in ratios.items()}
    intervals = {name: ratio_interval(*lists) for name, lists in ratios.items()}
    intervals["CHAIR-s"] = wilson(bad, len(rows)) if rows else None
    counts = {"captions": len(rows), "captions_wrong": bad, "mentions": sum(mentions), "mentions_wrong": sum(wrong)}
    counts |= {"objects_named": sum(named), "objects_right": sum(hits), "objects_shown": sum(shown)}
    return {"scores": scores, "intervals": {k: v for k, v in intervals.items() if v}, "counts": counts}


def wrong_captions(images: Mapping[str, ImageObjects], captions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The captions with objects that are not there, for a person to look at."""
    return [
        {
            "image_id": image_id,
            "caption": captions[image_id],
            "wrong": sorted(set(row.wrong)),
            "shown": sorted(row.shown),
        }
        for image_id, row in images.items()
        if row.wrong
    ]


# POPE: questions about objects that are there and objects that are not


@dataclass(frozen=True)
class ObjectQuestion:
    """A line of a file of questions: {"question_id": 1, "image": "42.jpg", "text": "Is there ...?", "label": "yes"}."""

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
    absent = _ranking(truth, negatives, random)
    questions: list[ObjectQuestion] = []
    for image_id in _drawn(truth, max(1, least_objects), images, random):
        there = sorted(truth.objects[image_id])
        asked = random.permutation(there)[:pairs].tolist()
        file = truth.files.get(image_id, image_id + suffix)
        for one, other in zip(asked, absent(there), strict=False):  # few objects, or few others
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


def _ranking(truth: Truth, negatives: Negatives, random: np.random.Generator) -> Callable[[Sequence[str]], list[str]]:
    """What ranks the objects that an image does not show, the ones to ask about first; ties as in the list of names."""
    frequency = Counter(name for own in truth.objects.values() for name in own)
    together = Counter(pair for own in truth.objects.values() for pair in permutations(sorted(own), 2))

    def absent(there: Sequence[str]) -> list[str]:
        others = [name for name in truth.names.names if name not in there]
        if negatives == "random":
            return random.permutation(others).tolist()
        if negatives == "popular":
            return sorted(others, key=lambda name: -frequency[name])
        return sorted(others, key=lambda name: (-sum(together[one, name] for one in there), -frequency[name]))

    return absent


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
    """Answers by question_id as text, from lines {"question_id": 1, "answer": "Yes, there is."}.

    SampleError names the line of a bad one, or of a second answer.
    """
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


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines; ConfigError if the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def pope_scores(questions: Sequence[ObjectQuestion], answers: Mapping[str, str]) -> dict[str, Any]:
    """Scores of the answers, shares from 0 to 1; None where there is nothing to divide by.

    An answer that is neither yes nor no is wrong for `accuracy` and `recall`, no yes for `precision` and `yes share`,
    and listed by its question's id.

    Raises:
        SampleError: a question has no answer, or an answer no question.
    """
    ids = [str(question.question_id) for question in questions]
    missing = [key for key in ids if key not in answers]
    unknown = [key for key in answers if key not in set(ids)]
    for wrong, what in ((missing, "questions have no answer"), (unknown, "answers have no question")):
        if wrong:
            raise SampleError(f"{len(wrong)} {what}: question_id {first_few(wrong)}")
    said = {key: yes_no(answers[key]) for key in ids}
    pairs = [(question.label == YES, said[key]) for question, key in zip(questions, ids, strict=True)]
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


# POPE: asking checkpoints


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


def evaluate_pope(run: PopeRun, processes: Processes) -> dict[str, Any] | None:
    """Ask, score and write; every rank must call it. The content of `pope.json`, on rank 0.

    Raises:
        MiniGPT4Error: something is wrong with configuration, images or checkpoints; the text says what.
    """
    rules = _rules(run)
    log.info("%d questions; prompt %r; stop %s; %s", len(run.questions), rules.prompt, rules.stop, rules.decoding)
    files = question_files(run.questions, run.images)
    images = ImageList(files, image_processor(run.cfg), feature_cache(run.cfg))
    batches = images.batches(batch_size(run.cfg))
    said = predict(run.cfg, images, batches, [rules], run.checkpoints, run.folder, processes)
    if said is None:
        return None
    rows = [_row(run, checkpoint, own) for checkpoint, (own,) in zip(run.checkpoints, said, strict=True)]
    setup = setup_metadata(run.cfg, replace(rules, own_prompts={}))
    results = {"setup": setup, "images": len({file.file for file in files}), "checkpoints": rows}
    write_json(run.folder / "pope.json", results, "--save_path")
    return results


def pope_table(results: Mapping[str, Any]) -> Table:
    """A row a checkpoint."""
    return score_table({row["name"]: row["scores"] for row in results["checkpoints"]}, POPE_METRICS)


def _rules(run: PopeRun) -> PromptRules:
    if run.prompt.count(QUESTION_PLACE) != 1:
        raise ConfigError(f"--prompt: {run.prompt!r} must hold {QUESTION_PLACE} exactly once, where the question goes")
    settings = replace(run.cfg.run.generation, prompt=run.prompt)
    rules = PromptRules.of(run.cfg.model, settings, run.cfg.run.seed, key="--prompt")
    prompts = {str(one.question_id): rules.prompt.replace(QUESTION_PLACE, one.text) for one in run.questions}
    return replace(rules, own_prompts=prompts)


def _row(run: PopeRun, checkpoint: NamedCheckpoint, answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Scores of one checkpoint, whose answers are written."""
    lines = [asdict(one) | {"answer": answers[str(one.question_id)].text} for one in run.questions]
    for line in lines:
        line["question"] = line.pop("text")  # in files of answers, `text` is what was answered
    write_lines(run.folder / f"answers_{checkpoint.file_name}.jsonl", lines)
    found = pope_scores(run.questions, {key: answer.text for key, answer in answers.items()})
    return {"name": checkpoint.name, "file": str(checkpoint.path), "sha256": checkpoint.sha256, **found}
