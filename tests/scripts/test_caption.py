"""`scripts/caption.py` on tiny weights: every image has its line, whatever happens to the run."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
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
IMAGES = 9
FAST_RESIZE = [
    "datasets.own.builder=image_caption_shards",
    "datasets.own.build_info.storage=own.tar",
    "datasets.own.vis_processor.eval.name=blip2_image_eval",
    "datasets.own.vis_processor.eval.fast_resize=True",
]
DYING = """
import os, signal
from minigpt4.inference.captioning import CaptionFile

add = CaptionFile.add
def add_and_die(self, lines):
    if lines and lines[0]["image_id"] == "104":
        with self.path.open("a") as file:
            file.write('{"image_id": "104", "ima')
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, lines)
CaptionFile.add = add_and_die
"""


@dataclass(frozen=True)
class Place:
    """Images and a configuration."""

    folder: Path
    script: ModuleType

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def arguments(self, name: str, *more: str, images: str | None = None) -> list[str]:
        """The command line; `name` is that of the output."""
        where = ["--images", images or str(self.images), "--output", str(self.folder / f"{name}.jsonl")]
        return ["--cfg-path", str(self.folder / "tiny.yaml"), *where, "--batch-size", "2", *more]

    def run(self, name: str, *more: str, status: int = 0) -> list[dict]:
        """Caption in this process, and assert the exit status; the lines."""
        assert self.script.main(self.arguments(name, *more)) == status
        return self.lines(name)

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("caption", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_bad_image_is_a_line_with_its_error_and_the_others_have_captions(place, capsys, monkeypatch):
    good = place.run("good")
    before = (place.images / "103.jpg").read_bytes()
    (place.images / "103.jpg").write_bytes(b"no image")
    lines = place.run("captions", status=1)
    assert [line for line in lines if "error" not in line] == good[:3] + good[4:]
    assert "103.jpg: not an image" in lines[3]["error"]
    assert f"[WARNING] {lines[3]['error']}" in capsys.readouterr().err
    option = ("--options", f"run.feature_cache={place.folder / 'features'}")
    assert place.run("filling", *option, status=1) == lines
    with monkeypatch.context() as patch:
        patch.setattr("minigpt4.models.mini_gpt4.load_vision", None)
        assert place.run("reading", *option, status=1) == lines
    (place.images / "103.jpg").write_bytes(before)
    assert place.run("captions", status=1) == lines
    assert place.run("captions", "--retry-failed") == lines[:3] + lines[4:] + [good[3]]


def test_second_run_captions_what_came_since_and_loads_no_model_for_nothing(place, monkeypatch, capsys):
    moved = (place.images / "102.jpg").rename(place.folder / "102.jpg")
    lines = place.run("captions")
    moved.rename(place.images / "102.jpg")
    longer = place.run("captions")
    assert longer[:-1] == lines
    assert longer[-1]["image_id"] == "102"
    with monkeypatch.context() as patch:
        patch.setattr("minigpt4.inference.captioning.Pipeline", None)
        assert place.run("captions") == longer

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt4.inference.captioning.read_batches", stop)
    assert place.run("interrupted", status=130) == []
    assert "the same command resumes" in capsys.readouterr().err


def test_killed_run_of_two_processes_is_made_good_by_one_with_the_same_captions(place):
    (place.folder / "dying.py").write_text(DYING)
    config = place.folder / "dying.yaml"
    config.write_text("imports: [dying]\n" + (place.folder / "tiny.yaml").read_text())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    arguments = [*place.arguments("killed"), "--cfg-path", str(config)]
    path = os.pathsep.join([str(REPOSITORY), str(place.folder)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 1, done.stderr
    left = (place.folder / "killed.jsonl").read_text()
    assert '{"image_id": "104", "ima' in left
    assert '"105.jpg"' not in left
    lines = place.run("killed")
    assert sorted(lines, key=lambda line: line["image"]) == place.run("captions")


def test_file_made_with_another_prompt_checkpoint_or_decoding_is_refused(place, capsys, tmp_path):
    lines = place.run("captions")
    other = tmp_path / "other.pth"
    published = torch.load(yaml.safe_load((place.folder / "tiny.yaml").read_text())["model"]["ckpt"], weights_only=True)
    torch.save({"model": {k: v + 1 for k, v in published["model"].items() if k.startswith("llama_proj")}}, other)
    for change, key in (
        (["--prompt", "<ImageHere> What?"], "prompt: "),
        (["--ckpt", str(other)], "checkpoint: "),
        (["--options", "run.generation.num_beams=2"], "decoding.num_beams: 1 then, 2 now"),
        (["--options", *FAST_RESIZE], 'image_processor: null then, {"fast_resize": true} now'),
        (["--images", str(place.images / "more")], "image_folder: "),
    ):
        assert place.run("captions", *change, status=2) == lines
        assert key in capsys.readouterr().err


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
    monkeypatch.setattr("minigpt4.inference.captioning.Pipeline", None)
    assert place.script.main([*place.arguments("captions"), *change]) == 2
    assert complaint in capsys.readouterr().err
