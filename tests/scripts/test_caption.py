"""`scripts/caption.py` on tiny weights: every image has its line, whatever happens to the run."""

import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from minigpt4.inference.pipeline import pipeline

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "caption.py"
BROKEN = REPOSITORY / "tests" / "data" / "images"
IMAGES = 9
OTHER_PROCESSOR = [
    "datasets.own.builder=image_caption_shards",
    "datasets.own.build_info.storage=own.tar",
    "datasets.own.vis_processor.eval.name=blip2_image_eval",
    "datasets.own.vis_processor.eval.min_scale=0.5",
]
DYING = """
import os, signal
from minigpt4.inference.captioning import AnswerStore

add = AnswerStore.add
def add_and_die(self, lines):
    lines = list(lines)
    if lines and lines[0]["image_id"] == "104":
        with self.path.open("a") as file:
            file.write('{"image_id": "104", "ima')
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, lines)
AnswerStore.add = add_and_die
"""


class Place:
    """Images and a configuration."""

    def __init__(self, folder: Path, script: ModuleType) -> None:
        self.folder, self.images, self.script = folder, folder / "images", script

    def arguments(self, name: str, *more: str) -> list[str]:
        """The command line; `name` is that of the output."""
        where = ["--images", str(self.images), "--output", str(self.folder / f"{name}.jsonl")]
        return ["--cfg-path", str(self.folder / "tiny.yaml"), *where, "--batch-size", "2", *more]

    def run(self, name: str, *more: str, status: int = 0) -> list[dict]:
        """Caption in this process, and assert the exit status; the lines."""
        assert self.script.main(self.arguments(name, *more)) == status
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def damage(self, name: str) -> bytes:
        """Make an image none; what it was."""
        file = self.images / name
        before = file.read_bytes()
        file.write_bytes(b"no image")
        return before


@pytest.fixture(scope="module")
def script(load_script) -> ModuleType:
    return load_script("scripts/caption.py")


@pytest.fixture
def place(tmp_path, script, tiny_section) -> Place:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    (tmp_path / "images" / "more").mkdir(parents=True)
    for number in range(IMAGES):
        pixels = random.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / ("more" if number > 6 else ".") / f"10{number}.jpg")
    model = tiny_section(arch="minigpt4", model_type="pretrain_vicuna0", end_sym="###", prompt_template="{}")
    run = {"num_workers": 0, "device": "cpu", "generation": {"max_new_tokens": 6}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"model": model, "datasets": {}, "run": run}))
    return Place(tmp_path, script)


def test_every_image_of_a_folder_has_the_caption_of_the_python_api(place, capsys):
    lines = place.run("captions")
    names = [f"10{number}.jpg" for number in range(7)] + ["more/107.jpg", "more/108.jpg"]
    assert [list(line) for line in lines] == [["image_id", "image", "caption"]] * IMAGES
    assert [line["image"] for line in lines] == names
    assert [line["image_id"] for line in lines] == [f"10{number}" for number in range(IMAGES)]
    model = pipeline(place.folder / "tiny.yaml", device="cpu")
    assert [line["caption"] for line in lines] == model.caption([place.images / name for name in names], batch_size=2)
    assert capsys.readouterr().out.startswith(f"{IMAGES} captions, 0 failed ({IMAGES} new): ")


def test_batch_invariant_captions_do_not_depend_on_the_size_of_a_batch(place):
    switch = ("--options", "run.batch_invariant=True", "model.llm_precision=bf16")
    alone = place.run("alone", "--batch-size", "1", *switch)
    assert len({line["caption"] for line in alone}) > IMAGES // 2
    assert place.run("four", "--batch-size", "4", *switch) == place.run("all", "--batch-size", "16", *switch) == alone


def test_bad_images_are_lines_with_their_errors_and_the_others_have_captions(place, capsys):
    good, before = place.run("good"), place.damage("103.jpg")
    lines = place.run("captions", status=1)
    assert [line for line in lines if "error" not in line] == good[:3] + good[4:]
    assert "103.jpg: not an image" in lines[3]["error"]
    assert f"[WARNING] {lines[3]['error']}" in capsys.readouterr().err
    (place.images / "103.jpg").write_bytes(before)
    assert place.run("captions", status=1) == lines
    assert place.run("captions", "--retry-failed") == lines[:3] + lines[4:] + [good[3]]


def test_images_that_decoders_fail_on_are_lines_too_whoever_reads_them(place):
    good = place.run("good")
    for number, file in enumerate(sorted(BROKEN.iterdir())):
        (place.images / f"10{number}.jpg").write_bytes(file.read_bytes())
    (place.images / "106.jpg").unlink()
    os.mkfifo(place.images / "106.jpg")
    images = [str(file) for file in sorted(place.images.rglob("*.jpg"))]
    lines = place.run("captions", "--images", *images, "--options", "run.num_workers=1", status=1)
    errors = {line["image_id"]: line["error"] for line in lines if "error" in line}
    assert [name for name, error in errors.items() if f"{name}.jpg: " in error] == ["100", "101", "106"]
    said = [line["caption"] for line in good]
    assert [line["caption"] for line in lines if "error" not in line][2:] == said[4:6] + said[7:]


def test_a_feature_cache_changes_no_caption_and_a_bad_image_is_still_one(place, monkeypatch):
    place.damage("103.jpg")
    plain = place.run("plain", status=1)
    option = ("--options", f"run.feature_cache={place.folder / 'features'}")
    assert place.run("filling", *option, status=1) == plain
    monkeypatch.setattr("minigpt4.models.mini_gpt4.load_vision", None)
    assert place.run("reading", *option, status=1) == plain


def test_second_run_captions_what_came_since_and_loads_no_model_for_nothing(place, monkeypatch):
    moved = (place.images / "102.jpg").rename(place.folder / "102.jpg")
    lines = place.run("captions")
    moved.rename(place.images / "102.jpg")
    longer = place.run("captions")
    assert longer[:-1] == lines
    assert longer[-1]["image_id"] == "102"
    monkeypatch.setattr("minigpt4.models.mini_gpt4.MiniGPT4.from_config", None)
    assert place.run("captions") == longer


def test_killed_run_of_two_processes_is_made_good_by_one_with_the_same_captions(place, warm):
    (place.folder / "dying.py").write_text(DYING)
    config = place.folder / "dying.yaml"
    config.write_text("imports: [dying]\n" + (place.folder / "tiny.yaml").read_text())
    arguments = (SCRIPT, *place.arguments("killed"), "--cfg-path", config)
    run = warm.script(*arguments, cwd=place.folder, processes=2, path=(place.folder,))
    assert -9 in run.wait()
    assert 0 not in run.statuses, run.text()
    left = (place.folder / "killed.jsonl").read_text()
    assert '{"image_id": "104", "ima' in left
    assert '"105.jpg"' not in left
    lines = place.run("killed")
    assert sorted(lines, key=lambda line: line["image"]) == place.run("captions")


def test_interrupted_run_says_how_to_go_on(place, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt4.inference.captioning.read_batches", stop)
    assert place.run("captions", status=130) == []
    assert "the same command resumes" in capsys.readouterr().err


def test_file_made_with_another_prompt_checkpoint_or_decoding_is_refused(place, capsys, tmp_path):
    lines = place.run("captions")
    other = tmp_path / "other.pth"
    published = torch.load(yaml.safe_load((place.folder / "tiny.yaml").read_text())["model"]["ckpt"], weights_only=True)
    torch.save({"model": {k: v + 1 for k, v in published["model"].items() if k.startswith("llama_proj")}}, other)
    for change, key in (
        (["--prompt", "<ImageHere> What?"], "prompt"),
        (["--ckpt", str(other)], "checkpoint"),
        (["--options", "run.generation.num_beams=2"], "decoding"),
        (["--options", *OTHER_PROCESSOR], "image_processor"),
        (["--images", str(place.images / "more")], "image_folder"),
    ):
        assert place.run("captions", *change, status=2) == lines
        assert f"made with another {key}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--options", "model.ckpt=null"], "--ckpt: is missing"),
        (["--ckpt", "nothing.pth"], "nothing.pth does not exist"),
        (["--prompt", "What?"], "--prompt: 'What?' must hold <ImageHere> exactly once"),
        (["--images", "nothing"], "--images: nothing: cannot be read"),
        (["--output", "captions.json"], "must end in .jsonl"),
    ],
)
def test_wrong_command_line_is_an_error_before_the_model_loads(place, capsys, change, complaint, monkeypatch):
    monkeypatch.setattr("minigpt4.models.mini_gpt4.MiniGPT4.from_config", None)
    assert place.script.main([*place.arguments("captions"), *change]) == 2
    assert complaint in capsys.readouterr().err
