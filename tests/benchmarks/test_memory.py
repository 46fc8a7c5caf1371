"""`benchmarks/memory.py`: estimates beside real steps, and the tables."""

import re

import pytest
import torch

BATCH = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory, script):
    """Weights of size tiny."""
    sizes, folder = script("sizes"), tmp_path_factory.mktemp("weights")
    sizes.write_weights(folder, sizes.SIZES["tiny"], torch.bfloat16)
    return folder


@pytest.fixture
def memory(script):
    return script("memory")


@pytest.mark.parametrize("name", ["DEFAULTS", "TO_DEFAULTS", "CACHED", "RECOMPUTED"])
def test_a_real_step_is_within_ten_percent_of_its_estimate(memory, script, weights, name):
    way = getattr(memory, name) if name != "TO_DEFAULTS" else memory.TO_DEFAULTS[0]
    size = script("sizes").SIZES["tiny"]
    sized = memory.Sized(
        lambda **changes: memory.MiniGPT4Config(**size.section(weights, "bf16", **changes)),
        size.llm_config(),
        memory.STAGE_2,
    )
    estimate = sized.estimate(way, BATCH)
    found = memory.measured(way, size, weights, "bf16", BATCH)
    assert found == pytest.approx(estimate.weights + estimate.activations, rel=0.1)


def test_what_one_cpu_cannot_do_is_not_measured(memory, script, weights):
    size = script("sizes").SIZES["tiny"]
    assert all(memory.measured(way, size, weights, "bf16", 1) is None for way in (memory.NF4, *memory.SPREAD))


def test_section_is_written_and_says_what_was_not_measured(memory, tmp_path, capsys):
    document = tmp_path / "performance.md"
    assert memory.main(["--size", "tiny", "--batch-size", "2", "--write", str(document)]) == 0
    shown = capsys.readouterr().out
    assert "### Size tiny, batch 2, 204 positions" in document.read_text()
    rows = [line for line in shown.splitlines() if re.search(r"\| (yes|no) \|", line)]
    assert len(rows) == len(memory.TO_DEFAULTS) + len(memory.FURTHER)
    assert all(row.endswith("| not measured yet |") for row in rows)


def test_recipes_come_with_their_memory_and_largest_batch(memory):
    text = memory.batches_section(["minigpt4_flickr_finetune"], [memory.DEFAULTS, memory.NF4], 24)
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| (\d+) \|$", text, re.MULTILINE)
    (plain_gib, plain_batch), (nf4_gib, nf4_batch) = (tuple(map(float, row)) for row in rows)
    assert nf4_gib < plain_gib < 24
    assert 2 < plain_batch < nf4_batch
