"""`python -m minigpt4.datasets.check`: counts, samples, the line of what is bad, and the exit status."""

import re
from pathlib import Path

import pytest

from minigpt4.common.utils import JsonLines
from minigpt4.datasets import EvalLoader
from minigpt4.datasets.check import main

CASES = Path(__file__).parents[1] / "data/cases"

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


def test_good_data_is_shown_and_counted_and_bad_records_are_named_by_their_lines(cfg, files, capsys):
    assert main([str(cfg), "--full"]) == 0
    out = capsys.readouterr().out
    assert "birds/train: 3 records; first: image_id 0, image 224 x 224, 'Bird 0.'" in out
    assert "birds/train: 3 samples read: 3 good, 0 bad" in out
    assert "frogs/train: 5 samples read: 5 good, 0 bad" in out
    with (files.folder / "birds.jsonl").open("a") as lines:
        lines.write('\n{"image_id": "9", "caption": "x"}\n{"image_id": "1"}\n{\n')
    assert main([str(cfg)]) == 1
    out = capsys.readouterr().out
    for line, reason in ((4, "the image"), (5, "the field 'caption' is missing"), (6, "not JSON")):
        assert f"bad: {files.folder}/birds.jsonl, line {line}: {reason}" in out
    assert "3 good, 3 bad" in out


def test_only_a_full_check_finds_what_must_be_decoded(cfg, files, capsys):
    (files.folder / "images" / "2.jpg").write_bytes(b"no image")
    files.tar("frogs-1.tar", [("a.png", b"no image"), ("a.txt", b"x")])
    assert (main([str(cfg)]), main([str(cfg), "--full"])) == (0, 1)
    out = capsys.readouterr().out
    assert "birds.jsonl, line 3: " in out
    assert "frogs-1.tar/a.png: not an image" in out
    for image in (files.folder / "images").iterdir():
        image.unlink()
    assert main([str(cfg)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"birds/train: nothing .* none of the first 3 samples .*/0.jpg does not", out)
    assert "frogs/train: 2 samples looked at" in out


@pytest.mark.parametrize("full", [[], ["--full"]])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lone_surrogate.json", "lone_surrogate.json, record 2: the caption cannot be read"),
        ("lone_surrogate.tar", "lone_surrogate.tar/1: the caption cannot be read"),
        ("unquoted.tsv", None),
        ("bom.tar", None),
        ("utf16.tar", None),
        ("unclosed.csv", "unclosed.csv: line 2: "),
    ],
)
def test_check_refuses_what_training_refuses_and_nothing_else(name, reason, full, files, tools, capsys, tmp_path):
    images = files.images([*range(6), *range(1000, 1010)])
    shards, file = name.endswith(".tar"), str(CASES / name)
    info = {"storage": file} if shards else {"ann_path": file, "image_path": str(images)}
    builder = f"image_caption_{'shards' if shards else 'json'}"
    (tmp_path / "mine.yaml").write_text(
        "model: {arch: minigpt4, model_type: pretrain_vicuna0}\n"
        f"datasets: {{mine: {{builder: {builder}, build_info: {info}}}}}\nrun: {{}}"
    )
    status = main([str(tmp_path / "mine.yaml"), *full])
    out, err = capsys.readouterr()
    if status == 2:
        assert reason in err
        return
    bad = [line.removeprefix("  bad: ") for line in out.splitlines() if line.startswith("  bad: ")]
    assert (status, len(bad)) == ((1, 1) if reason else (0, 0))
    assert not reason or reason in bad[0]
    list(EvalLoader(files.dataset(builder, **info), 2, num_workers=0, ledger=tools.lenient_monitor(tmp_path)))
    assert bad == [line["reason"] for line in JsonLines(tmp_path / "bad_samples.jsonl").read()]


def test_command_prints_nothing_else(cfg, warm, tmp_path):
    run = warm.script("minigpt4.datasets.check", cfg, cwd=tmp_path, apart=True)
    assert (run.wait(), run.text()) == ([0], "")
    assert "frogs/train" in run.out.read_text()


def test_wrong_configuration_exits_with_2_and_all_its_faults(cfg, capsys):
    assert main([str(cfg), "--options", "datasets.birds.build_info.ann_path=gone.jsonl"]) == 2
    assert "datasets.birds.build_info.ann_path: gone.jsonl does not exist" in capsys.readouterr().err
    assert main([str(cfg), "--options", "datasets.birds.batch_size=0", "run.seeed=1"]) == 2
    error = capsys.readouterr().err
    assert "datasets.birds.batch_size: 0" in error
    assert "run.seeed: unknown key; did you mean 'seed'?" in error
