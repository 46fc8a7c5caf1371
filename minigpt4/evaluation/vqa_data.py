"""The questions of benchmarks, from the files as their publishers and MiniGPT-4 have them; answers in result files.

What a file holds is checked and not changed: ids are those of the file. docs/evaluation.md lists the files.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from annotated_types import Ge, Le, MinLen

from minigpt4.common.binding import checked, fields_of
from minigpt4.common.errors import SampleError, require_same_ids
from minigpt4.common.torch_files import file_sha256
from minigpt4.common.utils import write_json, write_lines
from minigpt4.evaluation import hallucination, science_qa
from minigpt4.evaluation.questions import VisualQuestion, read_json, read_lines

PROBLEM_FORMAT = "CQM-A"
"""What ScienceQA's questions hold: as LLaVA 1.5 is asked."""


@dataclass(frozen=True)
class VqaQuestion(VisualQuestion):
    """A question with all that its file says."""

    record: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    """Types that tables tell apart, by name."""


class QuestionSet(NamedTuple):
    """What a reader found."""

    questions: list[VqaQuestion]
    form: str
    """Of the file, for reports."""
    split: str = ""
    """Where the file says it."""


@dataclass(frozen=True)
class Files:
    """What the user names of a benchmark."""

    questions: Path
    """A folder of ScienceQA, and of IconQA as published."""
    annotations: Path | None = None
    """VQAv2's and OK-VQA's answers; None: of a split that has none."""
    choices: Path | None = None
    """GQA's valid and plausible answers."""
    images: Path | None = None
    vectors: Path | None = None
    """Of words, for the choice nearest to an answer."""
    split: str = "test"
    """Of ScienceQA's `pid_splits.json`."""

    def hashes(self) -> dict[str, str]:
        """sha256 by path of each file, and of the JSON files in a folder."""
        named = [path for path in (self.questions, self.annotations, self.choices, self.vectors) if path]
        files = [file for path in named for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
        return {str(file): file_sha256(file) for file in files}

    def image(self, *names: str) -> str:
        """The first of an image's possible names that is there, or else the first."""
        return next((name for name in names if self.images and isfile(self.images / name)), names[0])  # noqa: PTH113


# What files hold


Label, Index, Choices = Annotated[int, Ge(0), Le(1)], Annotated[int, Ge(0)], Annotated[list[str], MinLen(2)]
Answers = Annotated[list[fields_of(answer=str)], MinLen(1)]
Texts = Annotated[list[str], MinLen(1)]
VQA = fields_of(image_id=int, question=str, question_id=int)
ANNOTATION = fields_of(question_id=int, answers=Answers)
OF_GOLD = {"correct_choice_idx": NotRequired[Index], "direct_answers": NotRequired[Texts]}
AOKVQA = fields_of(
    split=str, image_id=int, question_id=str, question=str, choices=Choices, difficult_direct_answer=bool, **OF_GOLD
)
TYPES, GROUPS = fields_of(structural=str, semantic=str, detailed=str), fields_of(**{"global": str | None})
PROGRAM = {"semantic": list[fields_of(operation=str, argument=str)], "entailed": list[str], "isBalanced": bool}
GQA = fields_of(question=str, answer=str, imageId=str, types=TYPES, groups=GROUPS, **PROGRAM)
GQA_LISTED = fields_of(image=str, question=str, answer=str, question_id=str | int)
GQA_CHOICES = dict[str, fields_of(valid=list[str], plausible=list[str])]
VIZWIZ = fields_of(image=str, question=str, answers=NotRequired[Answers])
ICONQA = fields_of(image_id=str | int, question=str, choices=Choices, answer=NotRequired[Index])
VSR = fields_of(image=str, caption=str, label=Label)
HATEFUL_MEMES = fields_of(id=str | int, img=str, text=str, label=NotRequired[Label])


# Readers


def _records(path: Path, kind: Any) -> tuple[list[dict[str, Any]], str]:
    """The records of JSON lines (.jsonl) or a list, and which of both it is."""
    if path.suffix == ".jsonl":
        return [checked(kind, one, where) for _, one, where in read_lines(path, None)], "lines"
    return checked(list[kind], read_json(path), path), "list"


def _questions(
    records: Iterable[Mapping[str, Any]], key: str, image: Callable[[Any], str | None], text: str, *types: str
) -> list[VqaQuestion]:
    """Questions by the names of their fields; `types`: those that tables tell apart, where they are there."""
    return [
        VqaQuestion(one[key], image(one), one[text], one, {name: one[name] for name in types if name in one})
        for one in records
    ]


def read_vqa(files: Files) -> QuestionSet:
    """VQAv2, and OK-VQA in both forms: MiniGPT-4's split file is a list, its images have 2017's names."""
    content, form, subtype, answers = read_json(files.questions), "list", "", {}
    if isinstance(content, dict):
        checked(fields_of(data_subtype=str, questions=list), content, files.questions)
        content, form, subtype = content["questions"], "publisher's", content["data_subtype"]
    ids = [one["question_id"] for one in checked(list[VQA], content, files.questions)]
    if files.annotations:
        whole = checked(fields_of(annotations=list[ANNOTATION]), read_json(files.annotations), files.annotations)
        answers = {one["question_id"]: one for one in whole["annotations"]}
        require_same_ids(ids, answers, f"{files.annotations}, for {files.questions}: ")

    def image(one: Mapping[str, Any]) -> str:
        number = f"{one['image_id']:012}.jpg"
        names = [f"COCO_{subtype}_{number}", f"{subtype}/COCO_{subtype}_{number}"] if subtype else []
        return files.image(*names, number)

    records = [{**answers.get(one["question_id"], {}), **one} for one in content]
    questions = _questions(records, "question_id", image, "question", "answer_type", "question_type")
    return QuestionSet(questions, form, subtype)


def read_aokvqa(files: Files) -> QuestionSet:
    records, form = _records(files.questions, AOKVQA)

    def image(one: Mapping[str, Any]) -> str:
        number = f"{one['image_id']:012}.jpg"
        return files.image(f"{one['split']}2017/{number}", number)

    splits = dict.fromkeys(one["split"] for one in records)
    return QuestionSet(_questions(records, "question_id", image, "question"), form, " and ".join(splits))


def read_gqa(files: Files) -> QuestionSet:
    """The publisher's dictionary, or the list of MiniGPT-4 and LAVIS under the same name."""
    content = read_json(files.questions)
    if isinstance(content, list):
        listed = checked(list[GQA_LISTED], content, files.questions)
        return QuestionSet(_questions(listed, "question_id", itemgetter("image"), "question"), "list")
    checked(dict[str, GQA], content, files.questions)
    records = [{"question_id": key, **one["types"], **one} for key, one in content.items()]
    image = "{imageId}.jpg".format_map
    return QuestionSet(_questions(records, "question_id", image, "question", "structural"), "dictionary")


def read_vizwiz(files: Files) -> QuestionSet:
    records, form = _records(files.questions, VIZWIZ)
    return QuestionSet(_questions(records, "image", itemgetter("image"), "question", "answer_type"), form)


def read_iconqa(files: Files) -> QuestionSet:
    """MiniGPT-4's list, or the publisher's folder with a folder a question."""
    if files.questions.is_dir():
        paths, form = sorted(files.questions.glob("*/data.json")), "a folder a question"
        records = [{"image_id": path.parent.name, **checked(dict, read_json(path), path)} for path in paths]
        checked(list[ICONQA], records, files.questions)
    else:
        records, form = _records(files.questions, ICONQA)
    records = [{**one, "number of choices": len(one["choices"])} for one in records]
    image = "{image_id}/image.png".format_map
    return QuestionSet(_questions(records, "image_id", image, "question", "number of choices"), form)


def read_vsr(files: Files) -> QuestionSet:
    """The id is the number of the record, from 1."""
    records, form = _records(files.questions, VSR)
    numbered = [{**one, "question_id": number} for number, one in enumerate(records, start=1)]
    return QuestionSet(_questions(numbered, "question_id", itemgetter("image"), "caption", "label", "relation"), form)


def read_hateful_memes(files: Files) -> QuestionSet:
    records, form = _records(files.questions, HATEFUL_MEMES)
    return QuestionSet(_questions(records, "id", itemgetter("img"), "text", "label"), form)


def read_pope(files: Files) -> QuestionSet:
    records = map(asdict, hallucination.read_object_questions(files.questions))
    return QuestionSet(_questions(records, "question_id", itemgetter("image"), "text", "label"), "lines")


def read_science_qa(files: Files) -> QuestionSet:
    records = [
        {"id": key, "text": science_qa.question_and_answer(one, PROBLEM_FORMAT)[0], **one}
        for key, one in science_qa.read_problems(files.questions, files.split).items()
    ]
    image = "{id}/{image}".format_map
    questions = _questions(records, "id", lambda one: one["image"] and image(one), "text", "subject", "grade")
    return QuestionSet(questions, f"problems, {PROBLEM_FORMAT}", files.split)


def read_questions(reader: Callable[[Files], QuestionSet], files: Files) -> QuestionSet:
    """The questions of a benchmark by its reader; SampleError that names file, record and field of a bad one, or an id
    that comes twice; ConfigError for a file that cannot be read."""
    found = reader(files)
    if not found.questions:
        raise SampleError(f"{files.questions}: holds no questions")
    _require_single([one.question_id for one in found.questions], files.questions)
    for one in found.questions:
        place = one.record.get("correct_choice_idx", one.record.get("answer"))
        if (choices := one.record.get("choices")) and isinstance(place, int) and place >= len(choices):
            raise SampleError(f"{files.questions}: question {one.question_id}: {place} is not the index of a choice")
    return found


def _require_single(ids: Sequence[int | str], path: Path) -> None:
    if twice := next((key for key, count in Counter(map(str, ids)).items() if count > 1), None):
        raise SampleError(f"{path}: the question_id {twice} comes twice")


# Result files


class ResultForm(NamedTuple):
    """How a benchmark's answers are handed in."""

    kind: Literal["list", "lines", "by id"]
    key: str
    text: str
    """Field of the answer."""

    def write(self, path: Path, answers: Mapping[int | str, str]) -> None:
        """Write the file; ConfigError if the disk refuses."""
        if self.kind == "by id":
            content = {key: {self.text: text} for key, text in answers.items()}
        else:
            content = [{self.key: key, self.text: text} for key, text in answers.items()]
        (write_lines if self.kind == "lines" else write_json)(path, content, "--save_path")

    def read(self, path: Path) -> dict[int | str, str]:
        """Answers by id, also from LLaVA's JSON lines; SampleError names a bad one, or an id that comes twice. Where an
        entry by id lacks the answer, A-OKVQA's form, it is left out."""
        if self.kind == "by id":
            content = checked(dict[str, fields_of(**{self.text: NotRequired[str]})], read_json(path), path)
            return {key: one[self.text] for key, one in content.items() if self.text in one}
        kind = fields_of(**{self.key: int | str, self.text: str})
        if self.kind == "lines" or path.suffix == ".jsonl":
            listed = [checked(kind, self._renamed(one), where) for _, one, where in read_lines(path, None)]
        else:
            listed = checked(list[kind], read_json(path), path)
        _require_single([one[self.key] for one in listed], path)
        return {one[self.key]: one[self.text] for one in listed}

    def _renamed(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """A line of LLaVA's, with `question_id` and `text`, by the names of this form."""
        names = {self.key: "question_id", self.text: "text"}
        return {**{own: line[theirs] for own, theirs in names.items() if theirs in line}, **line}
