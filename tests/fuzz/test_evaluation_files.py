"""Files of benchmarks, judges and curations that somebody damaged: read, or refused by name, never a traceback."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt4.ablation import read_plan
from minigpt4.common.curation_schema import ExportConfig
from minigpt4.common.errors import MiniGPT4Error
from minigpt4.curation.export import export
from minigpt4.curation.instructions import read_images
from minigpt4.curation.records import CurationFolder
from minigpt4.evaluation import advanced, llava_bench, vqa_data

DATA, REPO = Path(__file__).parents[1] / "data", Path(__file__).parents[2]
CASES = json.loads((DATA / "vqa_cases.json").read_text())
SCIENCE = DATA / "llava_eval" / "scienceqa"
VALUES = (
    *(None, 1, -1, 1.5, "", " ", "x", [], {}, True, 10**30, float("nan"), float("inf"), "\ud83d", [None], {"a": 1}),
    *(["x"], "a" * 5000, "\0", "../x"),
)
YAML_VALUES = [one for one in VALUES if one != "\ud83d"]
GQA = list(CASES["gqa"]["questions"].values())[:3]
POPE = [{"question_id": n, "image": "a.png", "text": "Is there a dog?", "label": "no"} for n in range(3)]
QUESTIONS = {
    "vqa": ("vqav2.json", CASES["vqa"]["questions"]),
    "aokvqa": ("aokvqa.json", CASES["aokvqa"]["dataset"]),
    "gqa": ("gqa.json", {str(n): one for n, one in enumerate(GQA)}),
    "vizwiz": ("vizwiz.json", CASES["vizwiz"]["annotations"]),
    "iconqa": ("iconqa.json", CASES["iconqa"]["annotations"]),
    "vsr": ("vsr.jsonl", CASES["vsr"]["annotations"]),
    "hateful_memes": ("memes.jsonl", CASES["hateful_memes"]["annotations"]),
    "pope": ("pope.jsonl", POPE),
}
ANSWERS = [{"question_id": n, "text": "t", "answer_id": f"a{n}", "model_id": "m"} for n in (1, 2)]
ASKED = [
    {"question_id": 1, "image": "a.png", "text": "What?", "category": "conv"},
    {"question_id": 2, "image": "b.png", "text": "Why?", "category": "complex"},
]
CONTEXTS = [
    {"image": "a.png", "captions": ["x", "y"], "instances": [{"category": "dog", "bbox": [1, 2, 3, 4]}]},
    {"image": "b.png", "captions": ["x"], "instances": []},
]
RULES = {key: {"role": "Assistant", "prompt": "p"} for key in ("coco_conv", "coco_complex", "conv", "complex")}
BENCH = {"q.jsonl": ASKED, "c.jsonl": CONTEXTS, "rule.json": RULES, "one.jsonl": ANSWERS, "other.jsonl": ANSWERS}
TASKS = [{"image": "a.png", "task": "poem"}, {"image": "a.png", "task": "x", "question": "Q?", "criterion": "c"}]
TEXTS = dict.fromkeys(("question_id", "task", "question", "criterion", "image", "image_hash", "text"), "x")
SAID = {"model": "m", "row": 0, "checkpoint": {"sha256": "x"}, "setup": {}, "answers": [{**TEXTS, "ended": True}]}
VERDICTS = {"judge": "j", "kind": "model", "verdicts": {"k": {"pass": True, "reason": "r"}, "l": None}}


PIXEL = base64.b64decode("R0lGODdhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=")
REASON = [{"step": "refine", "rule": "r", "evidence": "e"}]
KEPT = {
    "image": "a.png",
    "sha256": hashlib.sha256(PIXEL).hexdigest(),
    "text": "A dog runs.",
    "failed_rules": [],
    "review": REASON,
}
REVIEWS = [
    {"id": "a", "reviewer": "x", "verdict": "reject", "reasons": ["other"], "seconds": 2.0, "time": "2026"},
    {"id": "b", "reviewer": "x", "verdict": "edit", "text": "A cat.", "reasons": []},
]
IMAGES = [{"id": n, "file_name": f"{n}.jpg", "width": 10, "height": 10} for n in (1, 2)]
CAPTIONS = {"images": IMAGES, "annotations": [{"image_id": n, "caption": "a dog"} for n in (1, 2)]}
BOXES = {"images": IMAGES, "categories": [{"id": 1, "name": "dog"}]}
BOXES["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}]


def questions(benchmark: str, file: str, **more: str) -> Callable[[Path], Any]:
    """Reads the questions of a benchmark from a folder; `more` files by their kind."""
    read = getattr(vqa_data, f"read_{benchmark}")

    def read_folder(folder: Path) -> Any:
        files = {kind: folder / name for kind, name in more.items()}
        return vqa_data.read_questions(read, vqa_data.Files(folder / file, images=folder, **files))

    return read_folder


def read_answers(folder: Path) -> Any:
    return [one.key for own in advanced.read_answers(folder) for one in own.answers]


ASKED_VQA, ASKED_GQA = {"vqav2.json": QUESTIONS["vqa"][1]}, {"gqa.json": QUESTIONS["gqa"][1]}
SCIENCE_FILES = {name: json.loads((SCIENCE / name).read_text()) for name in ("problems.json", "pid_splits.json")}
CASES_OF = {
    **{name: (40, questions(name, file), {file: content}) for name, (file, content) in QUESTIONS.items()},
    "answers": (
        60,
        questions("vqa", "vqav2.json", annotations="a.json"),
        ASKED_VQA | {"a.json": CASES["vqa"]["annotations"]},
    ),
    "choices": (
        60,
        questions("gqa", "gqa.json", choices="c.json"),
        ASKED_GQA | {"c.json": CASES["gqa"]["choices"]},
    ),
    "science_qa": (60, questions("science_qa", ""), SCIENCE_FILES),
    "judge": (100, lambda folder: llava_bench.read_comparisons(*(folder / name for name in BENCH)), BENCH),
    "tasks": (80, lambda folder: advanced.read_tasks(folder / "t.json", folder, {}, None, 0), {"t.json": TASKS}),
    "checkpoints": (80, read_answers, {"answers_m.json": SAID}),
    "verdicts": (80, advanced.read_verdicts, {"verdicts_j.json": VERDICTS}),
    "curation": (
        60,
        lambda folder: export(CurationFolder(folder), ExportConfig(), 0),
        {"4_filtered.jsonl": [{"id": key, **KEPT} for key in "ab"], "5_reviews.jsonl": REVIEWS},
    ),
    "boxes": (
        80,
        lambda folder: [one.text(boxes=True) for one in read_images(folder / "c.json", folder / "b.json")],
        {"c.json": CAPTIONS, "b.json": BOXES},
    ),
}
"""Number of cases, what reads a folder, and its good files."""


def written(file: Path, content: Any) -> Path:
    lines = file.suffix == ".jsonl" and isinstance(content, list)
    file.write_text("".join(json.dumps(one) + "\n" for one in content) if lines else json.dumps(content))
    return file


def readable_or_refused(read: Callable[[], Any], folder: Path, name: str) -> None:
    error = ""
    try:
        read()
    except MiniGPT4Error as refusal:
        error = str(refusal)
    assert not error or str(folder) in error, (name, error)


@pytest.mark.parametrize("kind", CASES_OF)
def test_a_damaged_file_is_read_or_refused_by_name(random_cases, tmp_path, kind):
    count, read, contents = CASES_OF[kind]
    (tmp_path / "a.png").write_bytes(PIXEL)
    files = [written(tmp_path / name, content) for name, content in contents.items()]
    read(tmp_path)
    for name, chance in random_cases(count):
        file = chance.choice(files)
        changed = chance.change(contents[file.name], lambda _, draw=chance: draw.choice(VALUES), ("id", "", "image"))
        written(file, changed)
        if chance.random() < 0.3:
            file.write_bytes(chance.change_bytes(file.read_bytes()))
        readable_or_refused(lambda: read(tmp_path), tmp_path, name)
        written(file, contents[file.name])


def test_plans_of_ablations(random_cases, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan, file = yaml.safe_load((REPO / "train_configs/ablations/mini.yaml").read_text()), tmp_path / "plan.yaml"
    for name, chance in random_cases(40):
        changed = chance.change(plan, lambda _, chance=chance: chance.choice(YAML_VALUES), ("zz", ""))
        file.write_text(yaml.safe_dump(changed, allow_unicode=True))
        readable_or_refused(lambda: read_plan(file), tmp_path, name)
