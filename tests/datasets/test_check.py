"""`python -m minigpt4.datasets.check`: counts, samples, the line of what is bad, and the exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.datasets.check import main

REPOSITORY = Path(__file__).parents[2]

YAML = """
model: {{arch: minigpt4, model_type: pretrain_vicuna0}}
datasets:
  birds:
    builder: image_caption_json
    build_info: {{ann_path: {folder}/birds.jsonl, image_path: {folder}/images}}
  frogs:
    builder: image_caption_shards
    build_info: {{storage: "{folder}/frogs-{{0..1}}.tar"}}
run: {{}}
"""


@pytest.fixture
def cfg(files):
    """Good data; images `0` to `2`."""
    files.images(range(3))
    lines = [f'{{"image_id": "{key}", "caption": "Bird {key}."}}' for key in range(3)]
    (files.folder / "birds.jsonl").write_text("\n".join(lines))
    files.shard("frogs-0.tar", range(2))
    files.shard("frogs-1.tar", range(2, 5))
    path = files.folder / "user.yaml"
    path.write_text(YAML.format(folder=files.folder))
    return path


def test_good_data_is_shown_and_counted(cfg, capsys):
    assert main([str(cfg), "--full"]) == 0
    out = capsys.readouterr().out
    assert "birds/train: 3 records; first: image_id 0, image 224 x 224, 'Bird 0.'" in out
    assert "birds/train: 3 samples read: 3 good, 0 bad" in out
    assert "frogs/train: 5 samples read: 5 good, 0 bad" in out


def test_every_bad_record_is_named_by_its_line(cfg, files, capsys):
    with (files.folder / "birds.jsonl").open("a") as lines:
        lines.write('\n{"image_id": "9", "caption": "x"}\n{"image_id": "1"}\n{\n')
    assert main([str(cfg)]) == 1
    out = capsys.readouterr().out
    for line, reason in ((4, "the image"), (5, "the field 'caption' is missing"), (6, "not JSON")):
        assert f"bad: {files.folder}/birds.jsonl, line {line}: {reason}" in out
    assert "3 good, 3 bad" in out


def test_only_a_full_check_finds_what_must_be_decoded(cfg, files, capsys):
    (files.folder / "images" / "2.jpg").write_bytes(b"no image")
    members = [("a.png", b"no image"), ("a.txt", b"x")]
    files.tar("frogs-1.tar", members)
    assert main([str(cfg)]) == 0
    assert main([str(cfg), "--full"]) == 1
    out = capsys.readouterr().out
    assert "birds.jsonl, line 3: " in out
    assert "frogs-1.tar/a.png: not an image" in out


def test_dataset_without_a_good_sample_is_reported_beside_the_others(cfg, files, capsys):
    for image in (files.folder / "images").iterdir():
        image.unlink()
    assert main([str(cfg)]) == 1
    out = capsys.readouterr().out
    assert "birds/train: nothing to train on" in out
    assert "frogs/train: 2 samples looked at" in out


def test_wrong_configuration_exits_with_2(cfg, capsys):
    assert main([str(cfg), "--options", "datasets.birds.build_info.ann_path=gone.jsonl"]) == 2
    assert "datasets.birds.build_info.ann_path: gone.jsonl does not exist" in capsys.readouterr().err


def test_command_runs_as_documented(cfg):
    command = [sys.executable, "-m", "minigpt4.datasets.check", str(cfg)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "frogs/train" in done.stdout
