"""Answers of checkpoints to prompts about many images: resumable, kept under a content hash, complete on rank 0.

One prompt for all images, or questions, each with its own.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from os.path import isfile
from pathlib import Path
from typing import Any

from minigpt4.common.checkpoint import file_sha256, read_card, require_file
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, SampleError, WeightsError, errors_as, first_few
from minigpt4.common.hub import local_path
from minigpt4.common.run_folder import versions
from minigpt4.common.utils import quick_hash, write_json, write_lines
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.evaluation.command import EvaluationRun, NamedCheckpoint
from minigpt4.evaluation.questions import IMAGE_MARKS, QUESTION_PLACE, VisualQuestion
from minigpt4.inference.captioning import AnswerStore, Job, generate
from minigpt4.inference.image_list import ImageFile, ImageList
from minigpt4.inference.pipeline import BATCH_SIZE, PromptRules, frozen_files, image_provenance, image_reader
from minigpt4.models.generation import Answer
from minigpt4.models.llava_weights import whole_file

log = logging.getLogger(__name__)

CARD_KEYS = ("arch", "model_type", "llm", "llm_fingerprint", "vision", "vision_fingerprints", "epoch", "iteration")
CARD_KEYS += ("valid_loss", "job_name", "run_started", "trained", "versions")
"""What a report repeats of a checkpoint's card; the rest is the configuration of the training."""
MODEL_KEYS = ("arch", "model_type", "llama_model", "llm_precision", "vit_model", "vit_precision", "image_size")
"""What a report repeats of the `model:` section."""
EPOCH = re.compile(r"checkpoint_(\d+)")


# Checkpoints to evaluate


def whole_checkpoint(cfg: Config) -> list[str]:
    """The whole LLaVA that `model.llama_model` is, as `read_checkpoint_list` takes it; ConfigError for an LLM alone."""
    file = whole_file(cfg.model)
    if file is None:
        raise ConfigError("--ckpt: is missing, and model.llama_model is no whole LLaVA, which needs none")
    return [f"{file.parent.name}={file}"]


def read_checkpoint_list(values: Sequence[str]) -> list[NamedCheckpoint]:
    """Checkpoints given as PATH or NAME=PATH, in their order; `checkpoint_3.pth` is called `epoch 3`. A path is also a
    file on the hub, `hf:owner/name/checkpoint_3.pth`.

    WeightsError for a file that does not exist or cannot be read, ConfigError where two have the same name.
    """
    found: list[NamedCheckpoint] = []
    for value in values:
        with errors_as(WeightsError, f"--ckpt: {value}"):
            name, mark, path = value.partition("=")
            if not (mark and name.strip() and path and not Path(value).is_file()):
                epoch = EPOCH.fullmatch(Path(value).stem)
                name, path = f"epoch {epoch[1]}" if epoch else Path(value).stem, value
            file = local_path(path, "--ckpt") if path.startswith(("hf:", "https:")) else Path(path).expanduser()
            require_file(file, "--ckpt")
            digest, card = file_sha256(file), read_card(file)
        if card is not None and card["sha256"] != digest:
            log.warning("%s is not the file that its card describes; the report shows no card", file)
            card = None
        own = card and {key: card[key] for key in CARD_KEYS if key in card}
        one = NamedCheckpoint(name.strip(), file, digest, own)
        same = [other.name for other in found if other.file_name == one.file_name]
        if same:
            raise ConfigError(f"--ckpt: {same[0]!r} and {one.name!r} would share their files; name them: NAME=PATH")
        found.append(one)
    return found


# The run


def predict(
    run: EvaluationRun, images: ImageList, prompts: Sequence[PromptRules]
) -> list[list[dict[str, Answer]]] | None:
    """On rank 0 the answers of each checkpoint to each prompt, by image id in the order of the images.

    Only missing answers are generated, whole batches at a time, and kept in the folder. Every rank must call it.
    MiniGPT4Error where an image or a checkpoint is wrong, or the folder cannot be written to.
    """
    cfg, checkpoints, folder, processes = run
    for rules in prompts:
        log.info("%d answers to %r; stop %s; %s", len(images), rules.prompt, rules.stop, rules.decoding)
    batches = images.batches(batch_size(cfg))
    ids = [[images.items[number].image_id for number in batch] for batch in batches]
    provenance = {
        "model": asdict(cfg.model),
        "frozen_files": frozen_files(cfg.model),
        "images": [[item.image_id, *(quick_hash(item.file) if item.file else ())] for item in images.items],
        "versions": processes.broadcast(versions()),
        "device": processes.device.type,
        "batches": None if cfg.run.batch_invariant else ids,
        **image_provenance(cfg),
    }
    jobs: dict[tuple[str, int], Job] = {}  # equal checkpoints are asked once
    for one, (number, rules) in product(checkpoints, enumerate(prompts)):
        if (one.sha256, number) not in jobs:
            own = provenance | rules.provenance() | {"checkpoint": one.sha256}
            store = AnswerStore.predictions(folder, own, processes.rank)
            lines = store.lines("rank*.jsonl")
            done = processes.gather([all(image in lines for image in batch) for batch in ids])
            missing = done and [batch for batch in range(len(ids)) if not any(rank[batch] for rank in done)]
            jobs[one.sha256, number] = Job(one.name, one.path, rules, store, processes.broadcast(missing))
    if not any(job.missing for job in jobs.values()):
        log.info("All answers of %d checkpoints are there; nothing is generated", len(checkpoints))
    generate(cfg, images, dict(enumerate(batches)), list(jobs.values()), processes)
    # Gathered, not read: files of other nodes may be out of reach.
    gathered = processes.gather({key: job.store.lines("rank*.jsonl") for key, job in jobs.items()})
    if gathered is None:
        return None
    answers = {}
    for key in jobs:
        lines = {image: line for rank in gathered for image, line in rank[key].items()}
        own = {item.image_id: lines[item.image_id] for item in images.items}
        answers[key] = {image: Answer(line["caption"], line.get("ended")) for image, line in own.items()}
    return [[answers[one.sha256, number] for number in range(len(prompts))] for one in checkpoints]


def setup_metadata(cfg: Config, rules: PromptRules, *packages: str) -> dict[str, Any]:
    """What is the same for all checkpoints, for the report; the versions of further `packages`, too."""
    model = {key: getattr(cfg.model, key, None) for key in MODEL_KEYS}
    asked = rules.provenance() | {"prompt": cfg.model.as_read(rules.prompt)}
    return {**asked, "batch_size": batch_size(cfg), "model": model, "versions": versions(*packages)}


def batch_size(cfg: Config) -> int:
    """Images that are answered together."""
    return cfg.run.batch_size_eval or (cfg.batch_size() if cfg.datasets else BATCH_SIZE)


# Questions, each with a prompt of its own


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
