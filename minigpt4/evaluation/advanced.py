"""Tasks whose answers somebody must judge: memes, recipes, advertisements, poems (the paper's Table 1), or others.

answers_<checkpoint>.json     every answer with its question, criterion and image, and how it was decoded
verdicts_<judge>.json         pass or fail, and why, by the key of an answer: of a model, or of a person's page

A key says nothing of who wrote the answer, so equal answers are judged once.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, NotRequired

from minigpt4.common.binding import checked, fields_of
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.schemas import AdvancedTask
from minigpt4.common.utils import decode, parse_json, quick_hash, quick_imports, write_json
from minigpt4.evaluation.command import EvaluationRun
from minigpt4.evaluation.judge import Judge, Question
from minigpt4.evaluation.questions import Text, VisualQuestion, read_json
from minigpt4.evaluation.yes_no import without_thought

TASKS = {
    "meme": AdvancedTask(
        "Explain why this meme is funny.",
        "it says what in picture and text makes the joke, and that is the joke. Describing the picture and calling it "
        "funny fails.",
    ),
    "recipe": AdvancedTask(
        "How should I make something like this?",
        "it gives ingredients, and steps in an order that would lead to the dish in the picture. Naming the dish alone "
        "fails.",
    ),
    "advertisement": AdvancedTask(
        "Help me draft a professional advertisement for this.",
        "it is a text that promotes the thing shown and can be used as it is: the product is right, there is a "
        "message, and an appeal to the reader. A description fails.",
    ),
    "poem": AdvancedTask(
        "Can you craft a beautiful poem about this image?",
        "it is verse, in lines and not prose, about what the picture shows. Refrains are fine.",
    ),
}
"""The published ones, each question word for word."""
RULES = (
    "Whatever was asked, an answer fails if it is empty, cut off by the token limit, goes round in circles, is in "
    "another language than the question, is about things that are not in the image, or refuses."
)
SYSTEM = "You judge answers to questions about images. You look at the image yourself, and reply with JSON alone."
PROMPT = """Somebody was shown this image and was asked: "{question}"
The answer was:
<answer>
{text}
</answer>{limit}
Does it pass? {rules} Beyond that it passes if {criterion}
Reply with one JSON object and nothing else: {{"pass": true or false, "reason": "one line"}}"""
CUT_OFF = "\nThe token limit cut it off here."
AGAIN = '\nA reply that is anything but this object cannot be read: {"pass": true or false, "reason": "one line"}'
FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
CONTROL = Path(__file__).with_name("advanced_control")
LOOP = 12
"""Times that a looping answer says its beginning."""
SHUFFLED = "images shuffled"
ALL = "all"
"""The column of all tasks, which no task may be called."""

ENTRY = fields_of(image=Text, task=Text, question=NotRequired[Text], criterion=NotRequired[Text])
"""Of a list of tasks."""
Verdict = fields_of(**{"pass": bool, "reason": str})
VERDICTS = fields_of(judge=str, kind=str, verdicts=dict[str, Verdict | None])
"""What `verdicts_<judge>.json` holds."""


@dataclass(frozen=True)
class TaskQuestion(VisualQuestion):
    """One question about one image, as part of a task."""

    task: str
    criterion: str


@dataclass(frozen=True)
class TaskAnswer:
    """What one model answered."""

    question_id: str
    task: str
    question: str
    criterion: str
    image: str
    """File."""
    image_hash: str
    text: str
    ended: bool | None
    """Whether the model ended it itself; None: unknown."""

    @classmethod
    def of(cls, name: str, task: str, question: str, criterion: str, file: Path, *said: Any) -> "TaskAnswer":
        """`said`: text, and whether it ended."""
        return cls(name, task, question, criterion, str(file), quick_hash(file)[-1], *said)

    @cached_property
    def key(self) -> str:
        """Of its verdicts: all that a judge gets to know."""
        seen = [self.image_hash, self.question, self.criterion, self.text, self.ended is False]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class AnswerSet:
    """The answers of one model, a row of the table; what `answers_<checkpoint>.json` holds."""

    model: str
    row: int
    """Its place in the table."""
    checkpoint: dict[str, Any]
    setup: dict[str, Any]
    answers: list[TaskAnswer]


# Questions


def read_tasks(
    source: Path, folder: Path | None, own: Mapping[str, AdvancedTask], limit: int | None, seed: int
) -> tuple[Path, list[TaskQuestion]]:
    """Where the names of images begin, and the questions, task by task.

    Args:
        source: folder with a folder a task, in which `question.txt` and `criterion.txt` replace what is known of it; or
            JSON, [{"image": file, "task": name, "question": ...}]; or images without tasks, each asked all of `own`.
        folder: where the files of a list are; None: beside it.
        own: tasks by name, beside `TASKS`.
        limit: if a task has more images, so many are drawn by `seed`.

    Raises:
        ConfigError: there are no images, or no tasks.
        SampleError: a task is unknown, or an image is missing or comes twice.
    """
    with quick_imports():
        from minigpt4.inference.image_list import drawn, find_images  # loads torch, which judging does not need

    base = source if source.is_dir() else folder or source.parent
    listed = read_json(source) if source.suffix.lower() == ".json" and source.is_file() else None
    if isinstance(listed, list) and any(isinstance(one, dict) and "task" in one for one in listed):
        entries = [(f"{source}, entry {number}", one) for number, one in enumerate(listed, start=1)]
    else:
        names = [one.name for one in find_images(source, folder, None, seed)]
        parts = [path for path in sorted(source.iterdir()) if path.is_dir()] if source.is_dir() else []
        texts: dict[str, dict[str, str]] = {path.name: {} for path in parts}
        for path in parts:
            if not any(name.startswith(f"{path.name}/") for name in names):
                raise ConfigError(f"--images: {path} has no images")
            for file in filter(Path.exists, (path / "question.txt", path / "criterion.txt")):
                with errors_as(ConfigError, f"--images: {file}"):
                    texts[path.name][file.stem] = decode(file.read_bytes()).strip()
        pairs = [(name, name.partition("/")[0]) for name in names] if parts else product(names, own)
        entries = [(f"{source}: {name}", {"image": name, "task": task, **texts.get(task, {})}) for name, task in pairs]
    by_task: dict[str, dict[str, TaskQuestion]] = {}
    for where, entry in entries:
        one = _question(where, entry, {**TASKS, **own}, base)
        if by_task.setdefault(one.task, {}).setdefault(one.question_id, one) is not one:
            raise SampleError(f"{where}: {one.question_id} comes twice; each task asks one question per image")
    if not by_task:
        raise ConfigError(f"--images: {source} names no tasks; see --help, or set run.advanced_tasks")
    asked: list[TaskQuestion] = []
    for group in by_task.values():  # of the same images, each task gets the same
        asked += drawn([*group.values()], limit, seed)
    return base, asked


def _question(where: str, entry: Any, known: Mapping[str, AdvancedTask], base: Path) -> TaskQuestion:
    image, name = checked(ENTRY, entry, where)["image"], entry["task"]
    own = {name: entry[name] for name in ("question", "criterion") if name in entry}
    _refuse_all([name], where)
    if name not in known and "question" not in own:
        raise SampleError(f"{where}: the task {name!r} has no question (question.txt); known: {', '.join(known)}")
    with errors_as(SampleError, f"{where}: the image {image}"):
        if not (base / image).is_file():
            raise SampleError(f"{where}: the image {base / image} does not exist; see --image-folder")
    task = replace(known[name], **own) if name in known else AdvancedTask(**own)
    return TaskQuestion(f"{name}: {image.removeprefix(f'{name}/')}", image, task.question, name, task.criterion)


def _refuse_all(tasks: Sequence[str], where: object) -> None:
    if ALL in tasks:
        raise SampleError(f"{where}: no task can be called {ALL!r}, as the column of all tasks is; choose another name")


# Answers


def answer(run: EvaluationRun, questions: Sequence[TaskQuestion], images: Path, prompt: str) -> list[Path]:
    """Ask checkpoints; their files of answers, on rank 0. Every rank must call it; arguments and errors as of `ask`."""
    from minigpt4.evaluation.generate import ask, setup_metadata

    rules, said = ask(run, questions, images, prompt)
    files = []
    for row, (one, texts) in enumerate(zip(run.checkpoints, said or [], strict=bool(said))):
        answers = []
        for own in questions:
            got = texts[own.question_id]
            place = (own.question_id, own.task, own.text, own.criterion, (images / own.image).resolve())
            answers.append(TaskAnswer.of(*place, got.text, got.ended))
        content = AnswerSet(one.name, row, one.identity, setup_metadata(run.cfg, rules), answers)
        files.append(run.folder / f"answers_{one.file_name}.json")
        write_json(files[-1], asdict(content), "--save_path")
    return files


def read_answers(folder: Path) -> list[AnswerSet]:
    """All answers in a folder, in the order of the table.

    ConfigError where there are none; SampleError for a bad file, or where two models were not asked the same.
    """
    sets: list[AnswerSet] = []
    for file in sorted(folder.glob("answers_*.json")):
        own = checked(AnswerSet, read_json(file), file)
        _refuse_all([one.task for one in own.answers], file)
        sets.append(own)
        asked = [{(one.question_id, one.question, one.image_hash) for one in who.answers} for who in (own, sets[0])]
        if asked[0] != asked[1]:
            raise SampleError(
                f"{file}: {own.model} and {sets[0].model} were not asked the same about the same images; answer again "
                "with both, or delete one of the files"
            )
    if not sets:
        raise ConfigError(f"{folder}: has no answers_*.json; the command `answer` writes them")
    return sorted(sets, key=lambda one: (one.row, one.model))


def shuffled(answers: Sequence[TaskAnswer], seed: int = 0) -> list[TaskAnswer]:
    """The same answers, each beside the image of another one of its task; without tasks of one image."""
    found = []
    for task in dict.fromkeys(one.task for one in answers):
        own = sorted((one for one in answers if one.task == task), key=lambda one: one.question_id)
        random.Random(seed).shuffle(own)
        for one, other in zip(own, own[1:] + own[:1], strict=True):
            if one.image_hash != other.image_hash:
                found.append(replace(one, image=other.image, image_hash=other.image_hash))
    return found


def control() -> dict[str, list[TaskAnswer]]:
    """Answers of known quality to the published tasks, by kind: only the good ones should pass."""
    good, descriptions = [], []
    for record in read_json(CONTROL / "control.json"):
        task = TASKS[record["task"]]
        asked = (record["image"], record["task"], task.question, task.criterion, CONTROL / record["image"])
        good.append(TaskAnswer.of(*asked, record["good"], True))
        descriptions.append(TaskAnswer.of(*asked, record["description"], True))
    return {
        "good": good,
        "description": descriptions,
        SHUFFLED: shuffled(good),
        "empty": [replace(one, text="") for one in good],
        "loop": [replace(one, text="\n".join([one.text.splitlines()[0]] * LOOP)) for one in good],
    }


# Verdicts


def to_judge(answers: Sequence[TaskAnswer], seed: int) -> dict[str, TaskAnswer]:
    """Different answers by key, in an order that shows nothing of who wrote them."""
    pairs = sorted({one.key: one for one in answers}.items(), key=itemgetter(0))
    random.Random(seed).shuffle(pairs)
    return dict(pairs)


def ask_judge(judge: Judge, answers: Sequence[TaskAnswer], seed: int) -> dict[str, Verdict | None]:
    """A verdict an answer, by key; None where the judge's second reply, too, is none. Errors of `Judge.ask_all`."""
    chosen = to_judge(answers, seed)
    found: dict[str, Verdict | None] = dict.fromkeys(chosen)
    for again in ("", AGAIN):
        left, questions = [one for key, one in chosen.items() if found[key] is None], []
        for one in left:
            limit = CUT_OFF if one.ended is False else ""
            asked = PROMPT.format_map({**vars(one), "limit": limit, "rules": RULES})
            questions.append(Question(asked + again, Path(one.image), SYSTEM))
        for one, reply in zip(left, judge.ask_all(questions), strict=True):
            found[one.key] = read_verdict(reply)
    return found


def prompt_hash(answers: Sequence[TaskAnswer]) -> str:
    """Of the words that judges read, answers aside."""
    asked = sorted({(one.question, one.criterion) for one in answers})
    return hashlib.sha256(json.dumps([SYSTEM, PROMPT, RULES, CUT_OFF, AGAIN, asked]).encode()).hexdigest()[:12]


def read_verdict(reply: str) -> Verdict | None:
    """The verdict that a reply is, in a code fence perhaps or after thoughts; None for any other."""
    reply = without_thought(reply)
    fenced = FENCED.fullmatch(reply)
    try:
        return checked(Verdict, parse_json(fenced[1] if fenced else reply), "")
    except (ValueError, SampleError):
        return None


def read_verdicts(folder: Path) -> list[dict[str, Any]]:
    """The judges whose verdicts lie in a folder: `judge` (name), `kind`, `verdicts` by key, and how they were asked.

    ConfigError where there are none; SampleError for a bad file, or two of one judge.
    """
    judges: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("verdicts_*.json")):
        own = checked(VERDICTS, read_json(file), file)
        if judges.setdefault(own["judge"], own) is not own:
            raise SampleError(f"{file}: the judge {own['judge']!r} has verdicts in another file, too; delete one")
    if not judges:
        raise ConfigError(f"{folder}: has no verdicts_*.json; the command `judge` writes them, or a person's page")
    return list(judges.values())
