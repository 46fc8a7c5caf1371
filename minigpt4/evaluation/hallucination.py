"""Objects that are named but not there: CHAIR of captions, and yes-or-no questions as in POPE.

Sources: Rohrbach et al., Object Hallucination in Image Captioning, 2018; Li et al., Evaluating Object Hallucination in
Large Vision-Language Models, 2023.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.utils import write_json
from minigpt4.evaluation.bootstrap import ratio_interval, wilson
from minigpt4.evaluation.caption_data import require_same_ids
from minigpt4.evaluation.generate import NamedCheckpoint, setup_metadata
from minigpt4.evaluation.objects import Truth
from minigpt4.evaluation.questions import (
    QUESTION_PLACE,
    VisualQuestion,
    ask,
    read_lines,
    require_texts,
    write_lines,
)
from minigpt4.evaluation.yes_no import yes_no

Negatives = Literal["random", "popular", "adversarial"]
NEGATIVES = get_args(Negatives)
ARE_PLURAL = ("skis", "scissors")
YES, NO = "yes", "no"
PROMPT = f"<Img><ImageHere></Img> {QUESTION_PLACE} Answer with yes or no."


# CHAIR


def chair(captions: Mapping[str, str], truth: Truth) -> dict[str, Any]:
    """Scores of captions, shares from 0 to 1 (None where there is nothing to divide by), with intervals and counts.

    `CHAIR-i`: of the mentions, those of objects that are not there. `CHAIR-s`: of the captions, those with such a
    mention. `CHAIR-i (once)` counts an object once a caption, however often it is mentioned. `recall`: of the
    objects that are there, those that are named. `F1`: harmonic mean of recall and 1 - `CHAIR-i (once)`.
    `words`: mean length of a caption. The intervals are 95%, over images. `wrong` lists the captions with objects that
    are not there. KeyError for an image that the truth does not know.
    """
    ratios: dict[str, list[tuple[int, int]]] = {}
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
            ratios.setdefault(name, []).append(pair)
        counts.update(mentions=len(mentions), mentions_wrong=len(wrong), captions_wrong=int(bool(wrong)))
        counts.update(objects_named=len(named), objects_right=len(right), objects_shown=len(shown))
        if wrong:
            names = {"wrong": sorted(set(wrong)), "shown": sorted(shown)}
            listed.append({"image_id": image_id, "caption": text, **names})
    sums = {name: [sum(side) for side in zip(*pairs, strict=True)] for name, pairs in ratios.items()}
    scores = {name: part / whole if whole else None for name, (part, whole) in sums.items()}
    intervals = {name: ratio_interval(*zip(*pairs, strict=True)) for name, pairs in ratios.items()}
    intervals["CHAIR-s"] = wilson(counts["captions_wrong"], len(captions))
    intervals = {name: ends for name, ends in intervals.items() if ends}
    return {"scores": scores, "intervals": intervals, "counts": dict(counts), "wrong": listed}


# POPE: questions about objects that are there and objects that are not


@dataclass(frozen=True)
class ObjectQuestion(VisualQuestion):
    """A line of a file of questions: {"question_id": 1, "image": "42.jpg", "text": "Is there ...?", "label": "yes"}."""

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
        least_objects: images with fewer objects are left out; ConfigError where fewer than `images` are left.
        images: draw so many of the others; None: all.
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


def read_questions(path: Path) -> list[ObjectQuestion]:
    """The questions of a file; SampleError that names the line of a bad one, or of an id that comes twice."""
    questions = {}
    for key, record, where in read_lines(path):
        require_texts(record, ("image", "text", "label"), where)
        label = record["label"].strip().lower()
        if label not in (YES, NO):
            raise SampleError(f"{where}: the field 'label' must be 'yes' or 'no'; it is {record['label']!r}")
        questions[key] = ObjectQuestion(record["question_id"], record["image"], record["text"], label)
    if not questions:
        raise SampleError(f"{path}: holds no questions")
    return list(questions.values())


def read_answers(path: Path) -> dict[str, str]:
    """Answers by question_id as text, from lines {"question_id": 1, "answer": "Yes, there is."}, also under `text`.

    SampleError names the line of a bad one, or of a second answer.
    """
    answers = {}
    for key, record, where in read_lines(path):
        answer = record.get("answer", record.get("text"))
        if not isinstance(answer, str):
            raise SampleError(f"{where}: the field 'answer' must be text")
        answers[key] = answer
    return answers


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
    cfg: Config,
    checkpoints: Sequence[NamedCheckpoint],
    questions: Sequence[ObjectQuestion],
    images: Path,
    folder: Path,
    prompt: str,
    processes: Processes,
) -> dict[str, Any] | None:
    """Ask about the images of a folder, score, and write into `folder`; every rank must call it.

    `prompt` has `<ImageHere>` and `{}` for the question, and goes into the model's template. Returns the content of
    `pope.json`, on rank 0. MiniGPT4Error for a fault in configuration, images or checkpoints.
    """
    rules, said = ask(cfg, checkpoints, questions, images, folder, prompt, processes)
    if said is None:
        return None
    rows = []
    for one, own in zip(checkpoints, said, strict=True):
        answers = {key: answer.text for key, answer in own.items()}
        lines = [asdict(question) | {"answer": answers[str(question.question_id)]} for question in questions]
        for line in lines:  # in files of answers, `text` is what was answered
            line["question"] = line.pop("text")
        write_lines(folder / f"answers_{one.file_name}.jsonl", lines, "--save_path")
        rows.append({**one.identity, **pope_scores(questions, answers)})
    count = len({question.image for question in questions})
    results = {"setup": setup_metadata(cfg, rules), "images": count, "checkpoints": rows}
    write_json(folder / "pope.json", results, "--save_path")
    return results
