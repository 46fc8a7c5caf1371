"""Objects that are named but not there: CHAIR of captions, and yes-or-no questions as in POPE.

Objects in texts are found by lists of synonyms; those in images come from several forms of files.

Sources: Rohrbach et al., Object Hallucination in Image Captioning, 2018; Li et al., Evaluating Object Hallucination in
Large Vision-Language Models, 2023.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, NotRequired

import numpy as np

from minigpt4.common.errors import ConfigError, SampleError, errors_as, first_few, require_same_ids
from minigpt4.common.utils import decode, write_json, write_lines
from minigpt4.evaluation.bootstrap import ratio_interval, wilson
from minigpt4.evaluation.command import EvaluationRun
from minigpt4.evaluation.questions import (
    QUESTION_PLACE,
    Text,
    VisualQuestion,
    checked,
    fields_of,
    read_json,
    read_questions,
)
from minigpt4.evaluation.yes_no import yes_no

NEGATIVES = ("random", "popular", "adversarial")
ARE_PLURAL = ("skis", "scissors")
YES, NO = "yes", "no"
PROMPT = f"<Img><ImageHere></Img> {QUESTION_PLACE} Answer with yes or no."
COCO_OBJECTS = Path(__file__).with_name("coco_objects.txt")
IRREGULAR_PAIRS = """calf:calves child:children foot:feet goose:geese half:halves knife:knives leaf:leaves loaf:loaves
    mouse:mice ox:oxen person:people scarf:scarves shelf:shelves tooth:teeth wife:wives wolf:wolves"""
IRREGULAR = dict(pair.split(":") for pair in IRREGULAR_PAIRS.split())
Words = tuple[str, ...]
ID = int | str
CATEGORY, IMAGE = fields_of(id=ID, name=str), fields_of(id=ID, file_name=NotRequired[str])
ANNOTATION = fields_of(image_id=ID, category_id=ID)
INSTANCES = fields_of(categories=list[CATEGORY], images=NotRequired[list[IMAGE]], annotations=list[ANNOTATION])
SCENES = dict[str, fields_of(groups=list[fields_of(thing=str)])]
LISTS = dict[str, fields_of(objects=list[str], file=NotRequired[str])]
"""The forms of `read_truth`."""


# Objects that a text names


class ObjectNames:
    """Objects by name, with `synonyms`, and `others`: words that name none. ConfigError where a word names two."""

    def __init__(self, synonyms: Mapping[str, Sequence[str]], others: Iterable[str] = ()) -> None:
        self.names = list(synonyms)
        self._of: dict[Words, str] = {}
        named = [(phrase, name) for name, more in synonyms.items() for phrase in (name, *more)]
        for phrase, name in [*named, *((phrase, "") for phrase in others)]:
            words = _words(phrase)
            if not words:
                raise ConfigError(f"synonyms: {phrase!r} of {name!r} has no words")
            if self._of.setdefault(words, name) != name:
                raise ConfigError(f"synonyms: {phrase!r} is a name of both {self._of[words]!r} and {name!r}")
            for last in plurals(words[-1]):
                self._of.setdefault((*words[:-1], last), name)
        self._longest = max(map(len, self._of), default=0)

    def mentions(self, text: str) -> list[str]:
        """The object of every mention, in the order of the text; of words that overlap, the longest count."""
        words, found, start = _words(text), [], 0
        while start < len(words):
            length = next((n for n in range(self._longest, 0, -1) if words[start : start + n] in self._of), 0)
            if name := self._of.get(words[start : start + length]):
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
            raise ConfigError(f"{path}, line {number}: the object {phrases[0]!r} is listed twice")
        elif phrases:
            synonyms[phrases[0]] = phrases[1:]
    if not synonyms:
        raise ConfigError(f"{path}: names no objects; write one per line: `name, synonym, synonym`")
    try:
        return ObjectNames(synonyms, others)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def mini_objects() -> ObjectNames:
    """The things of the mini world, which have no other names."""
    from minigpt4.mini.scenes import THINGS  # that package stands above this one

    return ObjectNames({thing.name: () for thing in THINGS})


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
        """The same, and what people named in their captions; SampleError for an image without captions, which would be
        judged more strictly than the others."""
        missing = [image_id for image_id in self.objects if image_id not in captions]
        if missing:
            some = first_few(map(repr, missing))
            raise SampleError(f"{len(missing)} of {len(self.objects)} images have no captions: {some}")
        said = {image_id: self.names.mentions("\n".join(captions[image_id])) for image_id in self.objects}
        return Truth({key: own | frozenset(said[key]) for key, own in self.objects.items()}, self.names, self.files)

    def called(self, known: Collection[str]) -> "Truth":
        """The same by the ids `known`; where none is an id of an image, images are called after their files."""
        if any(key in known for key in self.objects):
            return self
        names = {key: Path(self.files.get(key, key)).stem for key in self.objects}
        files = {names[key]: file for key, file in self.files.items() if key in names}
        return Truth({names[key]: own for key, own in self.objects.items()}, self.names, files)

    def only(self, image_ids: Iterable[str]) -> "Truth":
        """The truth of these images alone."""
        return Truth({key: self.objects[key] for key in image_ids}, self.names, self.files)


def read_truth(path: Path, synonyms: Path | None = None) -> Truth:
    """What the images show, from a file in one of three forms; image ids are compared as text.

        objects       {"42": ["dog", "cup"], ...}, also as {"42": {"objects": [...], "file": "42.png"}}
        COCO          instances_val2014.json: categories, images, annotations
        mini world    scenes_test.json, which the quickstart draws

    `synonyms` are the names of the objects; without, those of the mini world for its scenes, else of COCO. ConfigError
    where a file cannot be read, or has no truth, or objects that are not in the list; SampleError for a bad entry.
    """
    content = checked(dict, read_json(path), path)
    files: dict[str, str] = {}
    is_mini = any(isinstance(entry, dict) and "groups" in entry for entry in content.values())
    if content.keys() >= {"categories", "annotations"}:
        checked(INSTANCES, content, path)
        kinds, images = {one["id"]: one["name"] for one in content["categories"]}, content.get("images", [])
        files = {str(image["id"]): image["file_name"] for image in images if "file_name" in image}
        objects: dict[str, list[str]] = {str(image["id"]): [] for image in images}
        for one in content["annotations"]:
            if one["category_id"] not in kinds:
                raise SampleError(f"{path}: image {one['image_id']}: there is no category {one['category_id']}")
            objects.setdefault(str(one["image_id"]), []).append(kinds[one["category_id"]])
    elif is_mini:
        scenes = checked(SCENES, content, path)
        objects = {key: [group["thing"] for group in scene["groups"]] for key, scene in scenes.items()}
    else:
        entries = {key: one if isinstance(one, dict) else {"objects": one} for key, one in content.items()}
        checked(LISTS, entries, path)
        files = {key: one["file"] for key, one in entries.items() if "file" in one}
        objects = {key: one["objects"] for key, one in entries.items()}
    if not objects:
        raise ConfigError(f"{path}: holds no images")
    names = mini_objects() if is_mini and not synonyms else read_synonyms(synonyms or COCO_OBJECTS)
    known = {name: names.name_of(name) for own in objects.values() for name in own}
    if unknown := sorted(name for name, found in known.items() if found is None):
        raise ConfigError(
            f"{path}: {len(unknown)} of its objects are not in the list of names: {first_few(map(repr, unknown))}; "
            "list them in a file for --synonyms, one per line: `name, synonym, synonym`"
        )
    return Truth({key: frozenset(known[name] for name in own) for key, own in objects.items()}, names, files)


# CHAIR


def chair(captions: Mapping[str, str], truth: Truth) -> dict[str, Any]:
    """Scores of captions, shares from 0 to 1 (None where there is nothing to divide by), with intervals and counts.

    `CHAIR-i`: of the mentions, those of objects that are not there. `CHAIR-s`: of the captions, those with such a
    mention. `CHAIR-i (once)` counts an object once a caption, however often it is mentioned. `recall`: of the
    objects that are there, those that are named. `F1`: harmonic mean of recall and 1 - `CHAIR-i (once)`.
    `words`: mean length of a caption. The intervals are 95%, over images. `wrong` lists the captions with objects that
    are not there. KeyError for an image that the truth does not know.
    """
    pairs: dict[str, list[tuple[int, int]]] = {}
    listed, counts = [], Counter(captions=len(captions), captions_wrong=0)
    for image_id, text in captions.items():
        mentions, shown = truth.names.mentions(text), truth.objects[image_id]
        wrong, named = [name for name in mentions if name not in shown], set(mentions)
        right = named & shown
        own = {
            "CHAIR-i": (len(wrong), len(mentions)),
            "CHAIR-s": (int(bool(wrong)), 1),
            "CHAIR-i (once)": (len(named - shown), len(named)),
            "recall": (len(right), len(shown)),
            "F1": (2 * len(right), len(named) + len(shown)),
            "words": (len(text.split()), 1),
        }
        for name, pair in own.items():
            pairs.setdefault(name, []).append(pair)
        counts.update(mentions=len(mentions), mentions_wrong=len(wrong), captions_wrong=int(bool(wrong)))
        counts.update(objects_named=len(named), objects_right=len(right), objects_shown=len(shown))
        if wrong:
            names = {"wrong": sorted(set(wrong)), "shown": sorted(shown)}
            listed.append({"image_id": image_id, "caption": text, **names})
    scores, intervals = {}, {}
    for name, own in pairs.items():
        parts, wholes = zip(*own, strict=True)
        scores[name] = sum(parts) / sum(wholes) if sum(wholes) else None
        ends = wilson(sum(parts), len(own)) if name == "CHAIR-s" else ratio_interval(parts, wholes)
        intervals |= {name: ends} if ends else {}
    return {"scores": scores, "intervals": intervals, "counts": dict(counts), "wrong": listed}


# POPE: questions about objects that are there and objects that are not


@dataclass(frozen=True)
class ObjectQuestion(VisualQuestion):
    """A line of a file of questions: {"question_id": 1, "image": "42.jpg", "text": "Is there ...?", "label": "yes"}."""

    image: Text
    label: str
    """`yes` or `no`."""


def make_questions(
    truth: Truth,
    negatives: str,
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
        least_objects: images with fewer are left out; ConfigError where fewer than `images` are left.
        images: draw so many; None: all.
        suffix: of image files, where the truth does not name them: id + suffix.
    """
    if pairs < 1:
        raise ConfigError(f"--pairs: {pairs} must be at least 1")
    random = np.random.Generator(np.random.PCG64(seed))
    least = max(1, least_objects)
    chosen = [image_id for image_id, own in truth.objects.items() if len(own) >= least]
    if len(chosen) < (images or 1):
        raise ConfigError(
            f"{len(chosen)} images have {least} objects or more, {images or 1} are needed; see --least-objects"
        )
    if images is not None:
        chosen = [chosen[place] for place in sorted(random.choice(len(chosen), size=images, replace=False))]
    frequency = Counter(name for own in truth.objects.values() for name in own)
    together = Counter(pair for own in truth.objects.values() for pair in permutations(sorted(own), 2))
    questions: list[ObjectQuestion] = []
    for image_id in chosen:
        there = sorted(truth.objects[image_id])
        asked = random.permutation(there)[:pairs].tolist()
        others = [name for name in truth.names.names if name not in there]
        if negatives == "random":
            others = random.permutation(others).tolist()
        else:  # ties as in the list of names
            others.sort(key=lambda name: -frequency[name])
        if negatives == "adversarial":
            others.sort(key=lambda name: -sum(together[one, name] for one in there))
        file = truth.files.get(image_id, image_id + suffix)
        for one, other in zip(asked, others, strict=False):  # few objects, or few others
            for name, label in ((one, YES), (other, NO)):
                questions.append(ObjectQuestion(len(questions) + 1, file, question_text(name), label))
    return questions


def question_text(name: str) -> str:
    """`Is there a dog in the image?`"""
    if name in ARE_PLURAL:
        return f"Are there any {name} in the image?"
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def read_object_questions(path: Path) -> list[ObjectQuestion]:
    """The questions of a file; SampleError that names the bad one."""
    found = [replace(one, label=one.label.strip().lower()) for one in read_questions(path, ObjectQuestion)]
    for one in found:
        if one.label not in (YES, NO):
            raise SampleError(
                f"{path}, question {one.question_id}: the field 'label' must be 'yes' or 'no': {one.label!r}"
            )
    return found


def pope_scores(questions: Sequence[ObjectQuestion], answers: Mapping[str, str]) -> dict[str, Any]:
    """Scores of the answers, shares from 0 to 1; None where there is nothing to divide by.

    An answer that is neither yes nor no is wrong for `accuracy` and `recall`, no yes for `precision` and `yes share`,
    and listed by its question's id. SampleError for a question without an answer, or an answer without a question.
    """
    ids = [str(question.question_id) for question in questions]
    require_same_ids(ids, answers)
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


# POPE: asking checkpoints


def evaluate_pope(
    run: EvaluationRun, questions: Sequence[ObjectQuestion], images: Path, prompt: str
) -> dict[str, Any] | None:
    """Ask about the images of a folder, score, and write; every rank must call it.

    Returns the content of `pope.json`, on rank 0. `prompt` and errors are as of `ask`.
    """
    from minigpt4.evaluation.generate import ask, setup_metadata  # loads torch, which scoring does not need

    rules, said = ask(run, questions, images, prompt)
    if said is None:
        return None
    rows = []
    for one, own in zip(run.checkpoints, said, strict=True):
        answers = {key: answer.text for key, answer in own.items()}
        lines = [asdict(question) | {"answer": answers[str(question.question_id)]} for question in questions]
        for line in lines:  # in files of answers, `text` is what was answered
            line["question"] = line.pop("text")
        write_lines(run.folder / f"answers_{one.file_name}.jsonl", lines, "--save_path")
        rows.append({**one.identity, **pope_scores(questions, answers)})
    count = len({question.image for question in questions})
    results = {"setup": setup_metadata(run.cfg, rules), "images": count, "checkpoints": rows}
    write_json(run.folder / "pope.json", results, "--save_path")
    return results
