"""Questions about images, each with a prompt of its own: their files, how checkpoints are asked, files of answers."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import MinLen

from minigpt4.common.binding import checked, fields_of
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import LINE_END, decode, parse_json, write_json, write_lines
from minigpt4.conversation.decoding import Answer
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.evaluation.caption_data import first_few
from minigpt4.evaluation.generate import EvaluationRun, predict, setup_metadata
from minigpt4.inference.image_list import ImageFile, ImageList
from minigpt4.inference.pipeline import PromptRules, image_reader

QUESTION_PLACE = "{}"
PROMPT = f"<Img><ImageHere></Img> {QUESTION_PLACE}"
"""LLaVA's templates read it as `<image>` and a line for the question."""
Text = Annotated[str, MinLen(1)]
IMAGE_MARKS = re.compile(r"</?Img>|<ImageHere>")


@dataclass(frozen=True)
class VisualQuestion:
    """A question as files have it."""

    question_id: int | str
    image: Text | None
    """Name of the file; None: text alone."""
    text: Text


Kind = TypeVar("Kind", bound=VisualQuestion)


# What files hold

ANSWER = fields_of(text=str)


# Files


def read_lines(path: Path, key: str | None = "question_id") -> Iterator[tuple[str, dict[str, Any], str]]:
    """(`key` as text, record, place) of each line of JSON lines, whatever the file is called: published ones end in
    .json; without `key` the number of the line. SampleError names the line of a bad one, or a second one of a key."""
    with errors_as(ConfigError, f"{path}: cannot be read"):
        lines = LINE_END.split(decode(path.read_bytes()))
    seen = set()
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise SampleError(f"{where}: not JSON ({error}); the file must hold an object a line") from error
        if not isinstance(record, dict) or not isinstance(record.get(key, None if key else number), int | str):
            raise SampleError(f"{where}: not an object with the field {key!r}, text or a number")
        name = str(record[key] if key else number)
        if name in seen:
            raise SampleError(f"{where}: the {key} {name} comes twice")
        seen.add(name)
        yield name, record, where


def read_questions(path: Path, kind: type[Kind]) -> list[Kind]:
    """The questions of JSON lines, whose fields are those of `kind`; SampleError that names the line of a bad one."""
    found = [checked(kind, record, where) for _, record, where in read_lines(path)]
    if not found:
        raise SampleError(f"{path}: holds no questions")
    return found


def read_json(path: Path) -> Any:
    """The value in a JSON file; ConfigError if it cannot be read or is cut off."""
    with errors_as(ConfigError, f"{path}: cannot be read"):
        return parse_json(path.read_bytes())


def read_answer_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of answers {"question_id": 1, "text": "..."} by question_id as text; `answer`, as POPE's have it, comes
    back as `text`. SampleError names a bad line."""
    answers = {}
    for key, record, where in read_lines(path):
        own = record | {"text": record["answer"]} if "answer" in record else record
        answers[key] = checked(ANSWER, own, where)
    return answers


# Asking checkpoints


def question_files(questions: Sequence[VisualQuestion], images: Path) -> list[ImageFile]:
    """An entry a question, in whose place the questions of an image stand together, those without one last;
    SampleError that names the first missing images."""
    names = dict.fromkeys(question.image for question in questions if question.image is not None)
    order = {name: place for place, name in enumerate([*names, None])}
    missing = [name for name in names if not isfile(images / name)]  # noqa: PTH113 - that raises for long names
    if missing:
        count = f"{len(missing)} of {len(names)} images"
        raise SampleError(f"--image-path: {count} are not in {images}: {first_few(missing, 5)}")
    together = sorted(questions, key=lambda question: order[question.image])
    return [ImageFile(str(one.question_id), None if one.image is None else images / one.image) for one in together]


def ask(
    run: EvaluationRun,
    questions: Sequence[VisualQuestion],
    images: Path,
    prompt: str,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> tuple[PromptRules, list[dict[str, Answer]] | None]:
    """How was asked, and on rank 0 each checkpoint's answers by question_id as text; every rank must call it.

    `prompt` has `<ImageHere>`, of LLaVA also `<image>`, and `{}` for the question, and goes into the model's template;
    for a question without image it goes without what stands for one. With `choices`, by question_id as text, an answer
    is JSON, the losses of each choice's tokens, the end symbol last; questions go one by one, so that no bit depends on
    the others. SampleError for a question that has a place for an image in its text; other errors as of `predict`.
    """
    if prompt.count(QUESTION_PLACE) != 1:
        raise ConfigError(f"--prompt: {prompt!r} must hold {QUESTION_PLACE} exactly once, where the question goes")
    cfg = run.cfg
    prompt = prompt.replace(cfg.model.PLACEHOLDER, IMAGE_PLACEHOLDER)
    rules, own = PromptRules.of(cfg, prompt, source="--prompt"), {}
    text_alone = rules.prompt.replace(prompt, IMAGE_MARKS.sub("", prompt).strip())
    for one in questions:
        if mark := next((mark for mark in (cfg.model.PLACEHOLDER, IMAGE_PLACEHOLDER) if mark in one.text), None):
            raise SampleError(
                f"--questions: question {one.question_id} holds {mark}; images are asked about by 'image'"
            )
        whole = text_alone if one.image is None else rules.prompt
        own[str(one.question_id)] = whole.replace(QUESTION_PLACE, one.text)
    listed = ImageList(question_files(questions, images), image_reader(cfg))
    if choices:
        cfg = cfg.replace(run=replace(cfg.run, batch_size_eval=1))
    rules_of_all = replace(rules, own_prompts=own, choices=choices or {})
    said = predict(run._replace(cfg=cfg), listed, [rules_of_all])
    return rules, said and [answers for (answers,) in said]


def answer_checkpoints(
    run: EvaluationRun, questions: Sequence[VisualQuestion], images: Path, prompt: str, image_mark: str = ""
) -> list[Path]:
    """The files of `ask`ed answers, in LLaVA's form, one a checkpoint, on rank 0; `setup.json` beside them says how.

    The field `prompt` is the question, after `image_mark` where it has an image. The answer_id, random in the original,
    is a hash of checkpoint, question and text: the same evaluation writes the same bytes.
    """
    rules, said = ask(run, questions, images, prompt)
    if said is None:
        return []
    files = []
    for checkpoint, answers in zip(run.checkpoints, said, strict=True):
        lines = []
        for one in questions:
            key, text = one.question_id, answers[str(one.question_id)].text
            asked = one.text if one.image is None else image_mark + one.text
            digest = hashlib.sha256(f"{checkpoint.sha256} {key} {text}".encode()).hexdigest()[:22]
            own = {"answer_id": digest, "model_id": checkpoint.name, "metadata": {}}
            lines.append({"question_id": key, "prompt": asked, "text": text, **own})
        files.append(run.folder / f"answers_{checkpoint.file_name}.jsonl")
        write_lines(files[-1], lines, "--save_path")
    setup = {**setup_metadata(run.cfg, rules), "checkpoints": [one.identity for one in run.checkpoints]}
    write_json(run.folder / "setup.json", setup, "--save_path")
    return files
