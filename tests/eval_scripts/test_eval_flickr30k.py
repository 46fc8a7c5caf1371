"""Evaluations of several checkpoints: the same captions however they are made, whole files, clear errors."""

import hashlib
import importlib.metadata
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from minigpt4.evaluation import METRICS, score_captions
from minigpt4.models.mini_gpt4 import MiniGPT4

ONE_METRIC = ("--metrics", "ROUGE-L")
CONFIGS = Path(__file__).parents[2] / "eval_configs"
CAPTION_FILES = ("captions_pretrained.json", "captions_epoch_0.json", "captions_epoch_1.json")
FILES = ("metrics.csv", "metrics.json", "metrics.md", "metrics.png", "report.html", *CAPTION_FILES)


def _content(folder: Path) -> dict[str, str]:
    """Hash of each file that an evaluation leaves."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def _captions(file: Path) -> dict[str, str]:
    return {entry["image_id"]: entry["caption"] for entry in json.loads(file.read_text())}


def _facts(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def _scores(folder: Path) -> dict[str, dict[str, float]]:
    return {one["name"]: one["scores"] for one in _facts(folder)["checkpoints"]}


def _lines(folder: Path) -> list[int]:
    return [path.read_text().count("\n") for path in folder.glob("predictions/*/rank*.jsonl")]


# The same captions and scores


def test_captions_are_those_of_generate_in_the_order_of_the_data(complete, shared, alone):
    ids = [record["image_id"] for record in json.loads((shared.folder / "test.json").read_text())]
    said = [_captions(complete / name) for name in CAPTION_FILES]
    for captions in said:
        assert list(captions) == ids
        assert len(set(captions.values())) > len(ids) // 2
    assert said[0] != said[1] != said[2] != said[0]
    assert said[2]["104"] == alone("104.jpg")


def test_two_processes_leave_the_same_bytes_as_one(complete, shared, warm):
    run = shared.start(warm, "two", processes=2)
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert _content(shared.folder / "two") == _content(complete)
    lines = _lines(shared.folder / "two")
    assert (len(lines), sum(lines)) == (6, 33)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_invariant_captions_do_not_depend_on_batches_checkpoints_and_processes(shared, warm, precision):
    def switched(size):
        options = ("run.batch_invariant=True", f"run.batch_size_eval={size}", f"model.llm_precision={precision}")
        return replace(shared, more=(*ONE_METRIC, "--options", *options))

    name, last = CAPTION_FILES[2], [shared.checkpoints[2]]
    alone = switched(1).run(f"{precision}_1", checkpoints=last)
    said = (alone / name).read_bytes()
    assert switched(16).run(alone.name, checkpoints=last) == alone  # batches of another size go on with what is there
    assert _lines(alone) == [11]
    assert (switched(4).run(f"{precision}_4") / name).read_bytes() == said
    if precision == "bf16":
        run = switched(3).start(warm, "bf16_two", processes=2)
        assert run.wait() == [0, 0], run.text()[-4000:]
        assert (shared.folder / "bf16_two" / name).read_bytes() == said


def test_killed_evaluation_goes_on_and_leaves_the_same_bytes(complete, shared, warm):
    assert shared.with_plugin("dying").start(warm, "killed").wait() == [-9]
    folder = shared.folder / "killed"
    assert sum(_lines(folder)) == 11  # four batches
    assert not (folder / "metrics.json").exists()
    assert _content(shared.run("killed")) == _content(complete)
    assert sum(_lines(folder)) == 33


def test_kill_of_one_of_two_processes_is_made_good_by_one(complete, shared, warm):
    statuses = shared.with_plugin("dying").start(warm, "half", processes=2).wait()
    assert -9 in statuses
    assert 0 not in statuses
    assert _content(shared.run("half")) == _content(complete)


def test_drawn_captions_do_not_depend_on_what_was_drawn_before(own):
    own.change(run={"generation": {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}})
    together, alone = own.run("together"), own.run("alone", checkpoints=own.checkpoints[2:])
    assert (together / CAPTION_FILES[2]).read_bytes() == (alone / CAPTION_FILES[2]).read_bytes()
    other_seed = own.run("other", "--options", "run.seed=43", checkpoints=own.checkpoints[2:])
    assert (other_seed / CAPTION_FILES[2]).read_bytes() != (alone / CAPTION_FILES[2]).read_bytes()


def test_feature_cache_and_batch_size_change_no_caption_and_a_full_cache_needs_no_vision(complete, shared, monkeypatch):
    option = (*ONE_METRIC, "--options", f"run.feature_cache={shared.folder / 'features'}")
    batches = (*ONE_METRIC, "--options", "run.batch_size_eval=7")
    folders = [shared.run("batches", *batches), shared.run("filling", *option)]
    monkeypatch.setattr("minigpt4.models.mini_gpt4.load_vision", None)
    for folder in (*folders, shared.run("reading", *option)):
        for name in CAPTION_FILES:
            assert (folder / name).read_bytes() == (complete / name).read_bytes()


# Going on


def test_second_run_loads_no_model_leaves_the_same_bytes_and_shows_the_table(complete, shared, monkeypatch, capsys):
    content = _content(complete)
    monkeypatch.setattr(MiniGPT4, "from_config", None)
    (complete / "metrics.png").unlink()
    capsys.readouterr()
    assert _content(shared.run("complete")) == content
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flickr30k_grounded_detail, test: 11 images, references joined"
    assert lines[2:4] == [f"| checkpoint | {' | '.join(METRICS)} |", "| --- " * 7 + "|"]
    rows = [re.fullmatch(r"\| ([\w ]+?)( \| \d\.\d{4}){6} \|", line) for line in lines[4:7]]
    assert [row[1] for row in rows] == ["pretrained", "epoch 0", "epoch 1"]


def test_captions_are_made_anew_when_what_they_come_from_changes(own):
    def said(*options: str) -> bytes:
        return (own.run("results", *options, checkpoints=own.checkpoints[:1]) / CAPTION_FILES[0]).read_bytes()

    versions = [said(), said("--options", "run.generation.max_new_tokens=5")]
    versions.append(said("--options", "run.generation.prompt=<ImageHere> What is it?"))
    Image.new("RGB", (60, 80), "red").save(own.folder / "images" / "100.jpg")
    versions.append(said())
    shutil.copy(own.folder / "checkpoint_1.pth", own.folder / "start.pth")
    versions.append(said())
    assert len(set(versions)) == len(_lines(own.folder / "results")) == 5


# Files


@pytest.mark.parametrize(("mode", "field"), [("joined", "grounded_caption"), ("separate", "captions")])
def test_scores_are_those_of_the_captions(complete, shared, monkeypatch, mode, field):
    folder = complete
    if mode == "separate":
        shutil.copytree(complete, shared.folder / mode)
        monkeypatch.setattr(MiniGPT4, "from_config", None)  # the captions are those that are there
        folder = shared.run(mode, "--reference-mode", mode)
    records = json.loads((shared.folder / "test.json").read_text())
    references = {one["image_id"]: [one[field]] if mode == "joined" else one[field] for one in records}
    for name, file in zip(("pretrained", "epoch 0", "epoch 1"), CAPTION_FILES, strict=True):
        assert _scores(folder)[name] == score_captions(_captions(folder / file), references)
    assert _facts(folder)["reference_mode"] == mode
    assert f"11 images, references {mode}" in (folder / "metrics.md").read_text()


def test_report_names_decoding_prompt_mode_versions_and_checkpoints_and_compares_them(complete, shared):
    facts = _facts(complete)
    assert (facts["images"], facts["reference_mode"], facts["stop"]) == (11, "joined", ["###"])
    assert facts["prompt"].startswith("###Human: ")
    assert (facts["decoding"]["max_new_tokens"], facts["decoding"]["num_beams"]) == (12, 1)
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    files = [shared.folder / name for name in ("start.pth", "checkpoint_0.pth", "checkpoint_1.pth")]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert [one["sha256"] for one in facts["checkpoints"]] == hashes
    assert "max_new_tokens 12" in (complete / "metrics.md").read_text()
    for one in facts["checkpoints"]:
        for metric in ("CIDEr", "ROUGE-L"):
            low, high = one["intervals"][metric]
            assert low <= one["scores"][metric] <= high
    pairs = [(one["checkpoint"], one["baseline"]) for one in facts["comparisons"]]
    assert pairs == [("epoch 0", "pretrained"), ("epoch 1", "pretrained"), ("epoch 1", "epoch 0")]
    with Image.open(complete / "metrics.png") as image:
        assert image.size == (1200, 750)


def test_one_image_has_scores_but_no_intervals_and_a_card_must_be_of_its_file(own):
    records = json.loads((own.folder / "test.json").read_text())
    (own.folder / "test.json").write_text(json.dumps(records[:1]))
    sha256 = hashlib.sha256((own.folder / "checkpoint_0.pth").read_bytes()).hexdigest()
    (own.folder / "checkpoint_0.json").write_text(json.dumps({"sha256": sha256, "epoch": 0, "config": {}}))
    (own.folder / "checkpoint_1.json").write_text(json.dumps({"sha256": sha256, "epoch": 1}))
    facts = _facts(own.run("results"))
    assert [one["intervals"] for one in facts["checkpoints"]] == [{}] * 3
    assert [one["card"] for one in facts["checkpoints"]] == [None, {"epoch": 0}, None]
    assert facts["comparisons"] == []
    assert any("One image" in note for note in facts["notes"])


def test_trained_qformer_is_read_anew_for_each_checkpoint(own):
    own.change(model={"freeze_qformer": False, "ckpt_allow_keys": ["Qformer.*", "query_tokens"]})
    published = torch.load(own.folder / "start.pth", weights_only=True)["model"]
    torch.save({"model": {**published, "query_tokens": torch.ones(1, 8, 48)}}, own.folder / "checkpoint_0.pth")
    torch.save({"model": published}, own.folder / "checkpoint_1.pth")
    folder = own.run("results")
    first, second, third = (_captions(folder / name) for name in CAPTION_FILES)
    assert first == third != second


# Other data


def test_shipped_coco_configuration_evaluates_the_test_split_of_karpathys_file(own, monkeypatch):
    monkeypatch.chdir(own.folder)  # where its paths are files
    own.take(CONFIGS / "minigpt4_coco_eval.yaml")
    (own.folder / "coco").mkdir()
    (own.folder / "images").rename(own.folder / "coco" / "val2014")
    said = [[f"A brown dog sleeps {place}.", f"Two people walk {place}."] for place in range(10)]
    images = [
        {"filepath": "val2014", "filename": f"10{number}.jpg", "cocoid": 900 + number, "imgid": number}
        | {"split": "test" if number % 2 else "val", "sentences": [{"raw": text} for text in said[number]]}
        for number in range(10)
    ]
    (own.folder / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    folder = own.run("results", "--reference-mode", "separate", checkpoints=own.checkpoints[:1])
    captions, facts = _captions(folder / CAPTION_FILES[0]), _facts(folder)
    assert list(captions) == ["901", "903", "905", "907", "909"]
    assert (facts["data"], facts["images"]) == ("coco_karpathy, test", 5)
    assert "in one sentence" in facts["prompt"]
    references = {str(900 + n): said[n] for n in (1, 3, 5, 7, 9)}
    assert facts["checkpoints"][0]["scores"] == {"ROUGE-L": score_captions(captions, references)["ROUGE-L"]}


# Errors


def _break_data(folder: Path, what: str) -> None:
    records = json.loads((folder / "test.json").read_text())
    if what == "missing":
        (folder / "images" / "103.jpg").unlink()
    elif what == "damaged":
        (folder / "images" / "103.jpg").write_bytes(b"no image")
    elif what == "twice":
        records.append(records[0])
    elif what == "joined only":
        del records[2]["captions"]
    elif what == "misfit":
        torch.save({"model": {"llama_proj.weight": torch.zeros(3, 3)}}, folder / "start.pth")
    (folder / "test.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("what", "arguments", "text"),
    [
        ("", ["--ckpt", "a=nowhere.pth"], "there is no file nowhere.pth"),
        ("", ["--ckpt", "epoch 0={}/start.pth", "{}/checkpoint_0.pth"], "would share their files"),
        ("missing", [], r"test\.json, record 4: the image \S+103\.jpg does not exist"),
        ("damaged", [], "103.jpg: not an image"),
        ("twice", [], "record 12: the image id '100' comes twice"),
        ("joined only", ["--reference-mode", "separate"], "record 3: --reference-mode separate .*prepare_flickr30k"),
        ("misfit", [], "start.pth"),
        ("", ["--options", "run.generation.top_k=3"], "run.generation.top_k: unknown key"),
        ("", ["--options", "run.generation.num_beams=0"], "run.generation.num_beams: 0 must be at least 1"),
        ("", ["--options", "run.generation.prompt=Describe it."], "run.generation.prompt: 'Describe it.' must hold"),
    ],
)
def test_what_is_wrong_is_named(own, capsys, monkeypatch, what, arguments, text):
    _break_data(own.folder, what)
    if what not in ("damaged", "misfit"):
        monkeypatch.setattr(MiniGPT4, "from_config", None)  # named before anything loads
    given = [argument.format(own.folder) for argument in arguments]
    assert own.script.main(own.arguments("results", *given)) == 2
    assert re.search(text, capsys.readouterr().err)
