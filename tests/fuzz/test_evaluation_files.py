"""Files of benchmarks, judges and curations that somebody damaged: read, or refused by name, never a traceback."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

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
BENCHMARKS = {
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


def written(file: Path, content: Any) -> Path:
    lines = file.suffix == ".jsonl" and isinstance(content, list)
    file.write_text("".join(json.dumps(one) + "\n" for one in content) if lines else json.dumps(content))
    return file


def damage(file: Path, content: Any, chance: Any) -> None:
    """Write the content with one entry or some bytes changed."""
    written(file, chance.change(content, lambda _: chance.choice(VALUES), ("id", "", "image")))
    if chance.random() < 0.3:
        file.write_bytes(chance.change_bytes(file.read_bytes()))


def readable_or_refused(read: Callable[[], Any], file: Path, name: str) -> None:
    error = ""
    try:
        read()
    except MiniGPT4Error as refusal:
        error = str(refusal)
    assert not error or str(file.parent) in error, (name, error)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_questions_of_benchmarks(random_cases, tmp_path, benchmark):
    file, content = tmp_path / BENCHMARKS[benchmark][0], BENCHMARKS[benchmark][1]
    reader = getattr(vqa_data, f"read_{benchmark}")
    for name, chance in random_cases(40):
        damage(file, content, chance)
        readable_or_refused(lambda: vqa_data.read_questions(reader, vqa_data.Files(file, images=tmp_path)), file, name)


def test_answers_choices_and_problems_of_benchmarks(random_cases, tmp_path):
    questions = {"annotations": ("vqa", CASES["vqa"]["annotations"]), "choices": ("gqa", CASES["gqa"]["choices"])}
    problems = json.loads((SCIENCE / "problems.json").read_text())
    (tmp_path / "pid_splits.json").write_bytes((SCIENCE / "pid_splits.json").read_bytes())
    for name, chance in random_cases(60):
        for kind, (benchmark, content) in questions.items():
            asked = written(tmp_path / "asked.json", BENCHMARKS[benchmark][1])
            file, reader = tmp_path / f"{kind}.json", getattr(vqa_data, f"read_{benchmark}")
            damage(file, content, chance)
            files = vqa_data.Files(asked, images=tmp_path, **{kind: file})
            readable_or_refused(lambda r=reader, f=files: vqa_data.read_questions(r, f), file, name)
        file, files = tmp_path / "problems.json", vqa_data.Files(tmp_path)
        damage(file, problems, chance)
        readable_or_refused(lambda f=files: vqa_data.read_questions(vqa_data.read_science_qa, f), file, name)


def test_what_a_judge_compares(random_cases, tmp_path):
    files = [written(tmp_path / name, content) for name, content in BENCH.items()]
    assert len(llava_bench.read_comparisons(*files)) == 2
    for name, chance in random_cases(100):
        file = chance.choice(files)
        damage(file, BENCH[file.name], chance)
        readable_or_refused(lambda: llava_bench.read_comparisons(*files), file, name)
        written(file, BENCH[file.name])


def test_tasks_answers_and_verdicts(random_cases, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name, chance in random_cases(80):
        file = tmp_path / "tasks.json"
        damage(file, TASKS, chance)
        readable_or_refused(lambda f=file: advanced.read_tasks(f, tmp_path, {}, None, 0), file, name)
        file = tmp_path / "answers_m.json"
        damage(file, SAID, chance)
        readable_or_refused(
            lambda: [one.key for own in advanced.read_answers(tmp_path) for one in own.answers], file, name
        )
        file = tmp_path / "verdicts_j.json"
        damage(file, VERDICTS, chance)
        readable_or_refused(lambda: advanced.read_verdicts(tmp_path), file, name)


def test_records_and_verdicts_of_a_curation(random_cases, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    reason = [{"step": "refine", "rule": "r", "evidence": "e"}]
    common = {"image": "a.png", "sha256": digest, "text": "A dog runs.", "failed_rules": [], "review": reason}
    contents = {
        "4_filtered.jsonl": [{"id": key, **common} for key in "ab"],
        "5_reviews.jsonl": [
            {"id": "a", "reviewer": "x", "verdict": "reject", "reasons": ["other"], "seconds": 2.0, "time": "2026"},
            {"id": "b", "reviewer": "x", "verdict": "edit", "text": "A cat.", "reasons": []},
        ],
    }
    folder = CurationFolder(tmp_path)
    for file, content in contents.items():
        written(tmp_path / file, content)
    assert export(folder, ExportConfig(), 0)["records"] == 1
    for name, chance in random_cases(60):
        file = tmp_path / chance.choice(list(contents))
        damage(file, contents[file.name], chance)
        readable_or_refused(lambda: export(folder, ExportConfig(), 0), file, name)
        written(file, contents[file.name])


def test_captions_and_boxes(random_cases, tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 10, "height": 10} for n in (1, 2)]
    contents = {
        "captions.json": {"images": images, "annotations": [{"image_id": n, "caption": "a dog"} for n in (1, 2)]},
        "instances.json": {
            "images": images,
            "categories": [{"id": 1, "name": "dog"}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
        },
    }
    files = [written(tmp_path / name, content) for name, content in contents.items()]
    for name, chance in random_cases(80):
        file = chance.choice(files)
        damage(file, contents[file.name], chance)
        readable_or_refused(lambda: [one.text(boxes=True) for one in read_images(*files)], file, name)
        written(file, contents[file.name])


def test_plans_of_ablations(random_cases, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan, file = yaml.safe_load((REPO / "train_configs/ablations/mini.yaml").read_text()), tmp_path / "plan.yaml"
    for name, chance in random_cases(40):
        changed = chance.change(plan, lambda _, chance=chance: chance.choice(YAML_VALUES), ("zz", ""))
        file.write_text(yaml.safe_dump(changed, allow_unicode=True))
        readable_or_refused(lambda: read_plan(file), file, name)
