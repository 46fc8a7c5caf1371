"""`benchmarks/step.py`: every way trains on the same batches, and the section says what was measured."""

import re

import pytest
import torch

NAMES = [
    "plain",
    "logits at targets",
    "attention",
    "attention, no padding",
    "attention, no padding, prefix once",
    "features from the cache",
    "bf16",
    "all without cache",
    "all",
]


@pytest.fixture
def step(script):
    return script("step")


def test_every_way_is_measured_and_written_down(step, tmp_path, capsys):
    document = tmp_path / "performance.md"
    arguments = ["--size", "tiny", "--batch-size", "2", "--captions", "short", "--repeats", "1"]
    assert step.main([*arguments, "--dir", str(tmp_path / "weights"), "--write", str(document)]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^\| ([a-z0-9 ,]+) \| \d", shown, re.MULTILINE) == NAMES
    assert "| plain | " in shown
    assert "size tiny, batch 2, short captions" in document.read_text()


def test_all_ways_in_fp32_compute_the_same_loss(step, tmp_path, script):
    sizes = script("sizes")
    sizes.write_weights(tmp_path, sizes.SIZES["tiny"], torch.float32)
    batch = next(step.batches(2, 56, "short", "cpu"))
    losses = []
    for way in step.ways("bf16"):
        if way.precision == "fp32":
            own = step.Step(way, sizes.SIZES["tiny"], tmp_path, "cpu")
            torch.manual_seed(0)
            torch.nn.init.normal_(own.model.llama_proj.weight, std=0.02)
            torch.nn.init.zeros_(own.model.llama_proj.bias)
            losses.append(own.model(step._given(own, batch))["loss"].item())
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)
