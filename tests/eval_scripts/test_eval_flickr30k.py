"""Evaluations of several checkpoints: the same captions however they are made, whole files, clear errors."""

import hashlib
import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from minigpt4.common.config import Config
from minigpt4.evaluation import METRICS, score_captions
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.processors import open_image
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor

CAPTION_FILES = ("captions_pretrained.json", "captions_epoch_0.json", "captions_epoch_1.json")
FILES = ("metrics.csv", "metrics.json", "metrics.md", "metrics.png", "report.html", *CAPTION_FILES)


def _content(folder: Path) -> dict[str, str]:
    """Hash of each file that an evaluation leaves."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def _captions(file: Path) -> dict[str, str]:
    return {entry["image_id"]: entry["caption"] for entry in json.loads(file.read_text())}


def _scores(folder: Path) -> dict[str, dict[str, float]]:
    facts = json.loads((folder / "metrics.json").read_text())
    return {one["name"]: one["scores"] for one in facts["checkpoints"]}


# The same captions and scores


def test_every_image_has_its_own_caption_in_the_order_of_the_data(complete, shared):
    ids = [record["image_id"] for record in json.loads((shared.folder / "test.json").read_text())]
    for name in CAPTION_FILES:
        captions = _captions(complete / name)
        assert list(captions) == ids
        assert len(set(captions.values())) > len(ids) // 2


def test_checkpoints_say_different_things(complete):
    first, second, third = (_captions(complete / name) for name in CAPTION_FILES)
    assert first != second != third != first


def test_captions_are_those_of_generate(complete, shared):
    config = Config(shared.script.parse_args(shared.arguments("unused")))
    model = MiniGPT4.from_config(config.validate(training=False).model).eval()
    model.load_checkpoint(shared.folder / "checkpoint_1.pth")
    pixels = Blip2ImageEvalProcessor(image_size=56)(open_image(shared.folder / "images" / "104.jpg"))
    (alone,) = model.generate(pixels[None], [model.prompt_list[0]], max_new_tokens=12, stop=["###"])
    assert _captions(complete / "captions_epoch_1.json")["104"] == alone


def test_two_processes_leave_the_same_bytes_as_one(complete, shared):
    result = shared.start("two", processes=2)
    assert result.returncode == 0, result.stderr[-4000:]
    assert _content(shared.folder / "two") == _content(complete)
    lines = [path.read_text().count("\n") for path in (shared.folder / "two").glob("predictions/*/rank*.jsonl")]
    assert len(lines) == 6
    assert sum(lines) == 3 * 11


def test_one_run_over_all_checkpoints_is_as_separate_runs(complete, shared):
    for number, name in enumerate(CAPTION_FILES):
        folder = shared.run(f"separate_{number}", checkpoints=[shared.checkpoints[number]])
        assert (folder / name).read_bytes() == (complete / name).read_bytes()
        ((checkpoint, scores),) = _scores(folder).items()
        assert scores == _scores(complete)[checkpoint]


def test_killed_evaluation_goes_on_and_leaves_the_same_bytes(complete, shared):
    killed = shared.with_plugin("dying").start("killed")
    assert killed.returncode == -9
    folder = shared.folder / "killed"
    assert sum(path.read_text().count("\n") for path in folder.glob("predictions/*/rank0.jsonl")) == 11
    assert not (folder / "metrics.json").exists()
    assert _content(shared.run("killed")) == _content(complete)
    assert sum(path.read_text().count("\n") for path in folder.glob("predictions/*/rank0.jsonl")) == 33


def test_kill_of_one_of_two_processes_is_made_good_by_one(complete, shared):
    result = shared.with_plugin("dying").start("half", processes=2)
    assert result.returncode != 0
    assert _content(shared.run("half")) == _content(complete)


def test_drawn_captions_do_not_depend_on_what_was_drawn_before(own):
    own.change(run={"generation": {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}})
    together, alone = own.run("together"), own.run("alone", checkpoints=own.checkpoints[2:])
    assert (together / CAPTION_FILES[2]).read_bytes() == (alone / CAPTION_FILES[2]).read_bytes()
    other_seed = own.run("other", "--options", "run.seed=43", checkpoints=own.checkpoints[2:])
    assert (other_seed / CAPTION_FILES[2]).read_bytes() != (alone / CAPTION_FILES[2]).read_bytes()


def test_captions_from_a_feature_cache_are_the_same_and_a_full_one_needs_no_vision_encoder(
    complete, shared, monkeypatch
):
    option = ("--options", f"run.feature_cache={shared.folder / 'features'}")
    filling = shared.run("filling", *option)
    monkeypatch.setattr("minigpt4.models.mini_gpt4.load_vision", None)
    reading = shared.run("reading", *option)
    for name in CAPTION_FILES:
        assert (filling / name).read_bytes() == (complete / name).read_bytes() == (reading / name).read_bytes()


def test_batch_size_changes_no_caption(complete, shared):
    folder = shared.run("batches", "--options", "run.batch_size_eval=7")
    assert [_captions(folder / name) for name in CAPTION_FILES] == [
        _captions(complete / name) for name in CAPTION_FILES
    ]


# Going on


def test_second_run_generates_and_changes_nothing(complete, shared, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in complete.rglob("*") if path.is_file()}
    monkeypatch.setattr(MiniGPT4, "from_config", None)  # a model would be a waste of minutes
    shared.run("complete")
    assert {path: path.stat().st_mtime_ns for path in complete.rglob("captions*")} == {
        path: time for path, time in before.items() if path.name.startswith("captions")
    }
    assert (complete / "metrics.json").stat().st_mtime_ns == before[complete / "metrics.json"]


def test_deleted_file_of_a_report_comes_back_without_a_model(complete, shared, monkeypatch):
    content = _content(complete)
    (complete / "metrics.png").unlink()
    monkeypatch.setattr(MiniGPT4, "from_config", None)
    shared.run("complete")
    assert _content(complete) == content


def test_other_references_need_no_new_captions(complete, shared, monkeypatch):
    shutil.copytree(complete, shared.folder / "modes")
    monkeypatch.setattr(MiniGPT4, "from_config", None)
    folder = shared.run("modes", "--reference-mode", "separate")
    assert json.loads((folder / "metrics.json").read_text())["reference_mode"] == "separate"


def _made(folder: Path) -> int:
    return len(list(folder.glob("predictions/*/rank0.jsonl")))


@pytest.mark.parametrize("change", ["checkpoint", "decoding", "prompt", "image"])
def test_captions_are_made_anew_when_what_they_come_from_changes(own, change):
    options: tuple[str, ...] = ()
    chosen = own.checkpoints[:1]
    folder = own.run("results", checkpoints=chosen)
    if change == "checkpoint":
        shutil.copy(own.folder / "checkpoint_1.pth", own.folder / "start.pth")
    if change == "decoding":
        options = ("--options", "run.generation.max_new_tokens=5")
    if change == "prompt":
        options = ("--options", "run.generation.prompt=<ImageHere> What is it?")
    if change == "image":
        Image.new("RGB", (60, 80), "red").save(own.folder / "images" / "100.jpg")
    before = (folder / CAPTION_FILES[0]).read_bytes()
    own.run("results", *options, checkpoints=chosen)
    assert _made(folder) == 2
    assert (folder / CAPTION_FILES[0]).read_bytes() != before


# Files


def test_scores_are_those_of_the_captions(complete, shared):
    records = json.loads((shared.folder / "test.json").read_text())
    references = {record["image_id"]: [record["grounded_caption"]] for record in records}
    for name, file in zip(("pretrained", "epoch 0", "epoch 1"), CAPTION_FILES, strict=True):
        assert _scores(complete)[name] == score_captions(_captions(complete / file), references)


def test_console_shows_the_published_table(complete, shared, capsys):
    shared.run("complete")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flickr30k_grounded_detail, test: 11 images, references joined"
    assert lines[2:4] == [f"| checkpoint | {' | '.join(METRICS)} |", "| --- " * 7 + "|"]
    rows = [re.fullmatch(r"\| ([\w ]+?)( \| \d\.\d{4}){6} \|", line) for line in lines[4:7]]
    assert [row[1] for row in rows] == ["pretrained", "epoch 0", "epoch 1"]


def test_report_names_decoding_prompt_mode_versions_and_checkpoints(complete, shared):
    facts = json.loads((complete / "metrics.json").read_text())
    assert (facts["images"], facts["reference_mode"], facts["stop"]) == (11, "joined", ["###"])
    assert facts["prompt"].startswith("###Human: ")
    assert (facts["decoding"]["max_new_tokens"], facts["decoding"]["num_beams"]) == (12, 1)
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    hashes = [one["sha256"] for one in facts["checkpoints"]]
    files = [shared.folder / name for name in ("start.pth", "checkpoint_0.pth", "checkpoint_1.pth")]
    assert hashes == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    markdown = (complete / "metrics.md").read_text()
    assert "References: joined" in markdown
    assert "max_new_tokens 12" in markdown


def test_intervals_hold_the_scores_and_pairs_are_compared(complete):
    facts = json.loads((complete / "metrics.json").read_text())
    for one in facts["checkpoints"]:
        for metric in ("CIDEr", "ROUGE-L"):
            low, high = one["intervals"][metric]
            assert low <= one["scores"][metric] <= high
    pairs = [(one["checkpoint"], one["baseline"]) for one in facts["comparisons"]]
    assert pairs == [("epoch 0", "pretrained"), ("epoch 1", "pretrained"), ("epoch 1", "epoch 0")]


def test_chart_is_a_picture(complete):
    with Image.open(complete / "metrics.png") as image:
        assert image.size == (1200, 750)


def test_separate_references_score_against_each_caption(complete, shared):
    folder = shared.run("separate", "--reference-mode", "separate")
    records = json.loads((shared.folder / "test.json").read_text())
    references = {record["image_id"]: record["captions"] for record in records}
    captions = _captions(folder / CAPTION_FILES[1])
    assert _scores(folder)["epoch 0"] == score_captions(captions, references)
    assert captions == _captions(complete / CAPTION_FILES[1])
    assert "11 images, references separate" in (folder / "metrics.md").read_text()


def test_card_of_a_checkpoint_is_reported_if_it_is_of_this_file(own):
    file = own.folder / "checkpoint_0.pth"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    (own.folder / "checkpoint_0.json").write_text(json.dumps({"sha256": sha256, "epoch": 0, "config": {}}))
    (own.folder / "checkpoint_1.json").write_text(json.dumps({"sha256": sha256, "epoch": 1}))
    folder = own.run("results", checkpoints=own.checkpoints[1:])
    cards = [one["card"] for one in json.loads((folder / "metrics.json").read_text())["checkpoints"]]
    assert cards == [{"epoch": 0}, None]


def test_one_image_has_scores_but_no_intervals(own):
    records = json.loads((own.folder / "test.json").read_text())
    (own.folder / "test.json").write_text(json.dumps(records[:1]))
    facts = json.loads((own.run("results") / "metrics.json").read_text())
    assert [one["intervals"] for one in facts["checkpoints"]] == [{}] * 3
    assert facts["comparisons"] == []
    assert any("One image" in note for note in facts["notes"])


def test_trained_qformer_is_read_anew_for_each_checkpoint(own, parity_dir):
    own.change(model={"freeze_qformer": False, "ckpt_allow_keys": ["Qformer.*", "query_tokens"]})
    published = torch.load(own.folder / "start.pth", weights_only=True)["model"]
    model = {**published, "query_tokens": torch.ones(1, 8, 48)}
    torch.save({"model": model}, own.folder / "checkpoint_0.pth")
    torch.save({"model": published}, own.folder / "checkpoint_1.pth")
    folder = own.run("results")
    first, second, third = (_captions(folder / name) for name in CAPTION_FILES)
    assert first == third != second


# Errors


def _error(evaluation, capsys, *more: str, checkpoints: list[str] | None = None) -> str:
    assert evaluation.script.main(evaluation.arguments("results", *more, checkpoints=checkpoints)) == 2
    return capsys.readouterr().err


def test_missing_checkpoint_is_named_before_anything_loads(own, capsys, monkeypatch):
    monkeypatch.setattr(MiniGPT4, "from_config", None)
    assert "there is no file nowhere.pth" in _error(own, capsys, checkpoints=["a=nowhere.pth"])


def test_two_checkpoints_of_one_name_are_refused(own, capsys):
    message = _error(own, capsys, checkpoints=[f"epoch 0={own.folder}/start.pth", f"{own.folder}/checkpoint_0.pth"])
    assert "'epoch 0' and 'epoch 0' would share their files" in message


def test_missing_image_is_an_error_and_no_smaller_evaluation(own, capsys):
    (own.folder / "images" / "103.jpg").unlink()
    assert re.search(r"test\.json, record 4: the image \S+103\.jpg does not exist", _error(own, capsys))


def test_damaged_image_is_named(own, capsys):
    (own.folder / "images" / "103.jpg").write_bytes(b"no image")
    assert "103.jpg: not an image" in _error(own, capsys)


def test_image_that_comes_twice_is_an_error(own, capsys):
    records = json.loads((own.folder / "test.json").read_text())
    (own.folder / "test.json").write_text(json.dumps([*records, records[0]]))
    assert "record 12: the image id '100' comes twice" in _error(own, capsys)


def test_separate_mode_without_single_captions_names_the_way_out(own, capsys):
    records = json.loads((own.folder / "test.json").read_text())
    del records[2]["captions"]
    (own.folder / "test.json").write_text(json.dumps(records))
    message = _error(own, capsys, "--reference-mode", "separate")
    assert re.search(r"record 3: --reference-mode separate needs the field 'captions'.*prepare_flickr30k", message)


def test_decoding_out_of_range_is_refused_with_its_key(own, capsys):
    message = _error(own, capsys, "--options", "run.generation.num_beams=0", "run.generation.top_k=3")
    assert "run.generation.top_k: unknown key" in message
    assert "run.generation.num_beams: 0 must be at least 1" in _error(
        own, capsys, "--options", "run.generation.num_beams=0"
    )


def test_prompt_without_an_image_is_refused(own, capsys):
    message = _error(own, capsys, "--options", "run.generation.prompt=Describe it.")
    assert "run.generation.prompt: 'Describe it.' must hold <ImageHere> exactly once" in message


def test_checkpoint_that_does_not_fit_is_an_error(own, capsys):
    torch.save({"model": {"llama_proj.weight": torch.zeros(3, 3)}}, own.folder / "start.pth")
    assert "start.pth" in _error(own, capsys)
