"""Every benchmark on tiny weights: its ways say the same, and its section says what was measured."""

import os
import re
import shutil

import pytest
import torch

from minigpt4.common.errors import ConfigError, RunError
from minigpt4.models.llm import fingerprint

STEPS = [
    *("plain", "logits at targets", "attention", "attention, no padding", "attention, no padding, prefix once"),
    *("features from the cache", "bf16", "all without cache", "all"),
]
GENERATIONS = [
    *("plain", "logits at the last position", "images together", "images together, logits at the last position"),
    *("our loop, an image at a time", "our loop, images together"),
]
STARTS = ["unpickled in each process", "`load_llm`, `.bin`", "`load_llm`, safetensors"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, script):
    """Weights of size tiny, in fp32."""
    sizes, folder = script("sizes"), tmp_path_factory.mktemp("weights")
    sizes.write_weights(folder, sizes.SIZES["tiny"], torch.float32)
    return folder


@pytest.fixture
def tiny(script):
    return script("sizes").SIZES["tiny"]


@pytest.fixture(autouse=True)
def _small_matrices(script, monkeypatch):
    """Of the measured rate of matrix products."""
    monkeypatch.setattr(script("tables"), "MATRIX", 64)


# Steps


def test_every_step_is_measured_and_written_down(script, weights, tmp_path, capsys):
    document = tmp_path / "performance.md"
    arguments = ["--size", "tiny", "--batch-size", "2", "--captions", "short", "--repeats", "1"]
    assert script("step").main([*arguments, "--dir", str(weights), "--write", str(document)]) == 0
    assert re.findall(r"^\| ([a-z0-9 ,]+) \| \d", capsys.readouterr().out, re.MULTILINE) == STEPS
    assert "size tiny, batch 2, short captions" in document.read_text()


def test_all_steps_in_fp32_compute_the_same_loss(script, weights, tiny):
    step = script("step")
    batch, losses = next(step.batches(2, 56, "short", "cpu")), []
    for way in step.ways("bf16"):
        if way.precision == "fp32":
            own = step.Step(way, tiny, weights, "cpu")
            torch.manual_seed(0)
            torch.nn.init.normal_(own.model.llama_proj.weight, std=0.02)
            torch.nn.init.zeros_(own.model.llama_proj.bias)
            losses.append(own.model(step._given(own, batch))["loss"].item())
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)


# Generation


@pytest.mark.parametrize("beams", [1, 3])
def test_every_way_to_generate_says_the_same_and_is_written_down(script, weights, tmp_path, capsys, beams):
    document = tmp_path / "performance.md"
    arguments = ["--size", "tiny", "--images", "3", "--tokens", "2", "12", "--repeats", "1", "--beams", str(beams)]
    assert script("generate").main([*arguments, "--dir", str(weights), "--write", str(document)]) == 0
    rows = re.findall(r"^\| ([a-z, ]+) \| \d.* \| (\d+) \| \d+ \| 3 of 3 \|$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == GENERATIONS
    assert int(rows[-1][1]) < int(rows[2][1])
    assert f"size tiny, 3 images, beams {beams}" in document.read_text()


def test_compiled_parts_say_the_same_or_the_compiler_is_named(script, weights, capsys):
    ways = ["our loop, images together", "our loop, images together, compiled"]
    arguments = ["--size", "tiny", "--images", "2", "--tokens", "2", "4", "--repeats", "1", "--dir", str(weights)]
    status = script("generate").main([*arguments, "--compile", "--only", *ways])
    shown = capsys.readouterr()
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        assert status == 2
        assert "needs a C++ compiler" in shown.err
        return
    assert status == 0
    assert [name for name in ways if f"| {name} |" in shown.out] == ways
    assert shown.out.count("| 2 of 2 |") == 2


def test_answers_that_differ_are_an_error(script, weights, capsys, monkeypatch):
    generate = script("generate")
    monkeypatch.setattr(generate.Work, "_by_our_loop", lambda self, *prompts: [[-1]] * len(prompts[0]))
    arguments = ["--size", "tiny", "--images", "1", "--tokens", "2", "2", "--repeats", "1", "--dir", str(weights)]
    assert generate.main(arguments) == 2
    assert "our loop, an image at a time: 1 of 1 answers are not those of 'plain'" in capsys.readouterr().err


# Memory


@pytest.mark.parametrize("name", ["DEFAULTS", "TO_DEFAULTS", "CACHED", "RECOMPUTED"])
def test_a_real_step_is_within_ten_percent_of_its_estimate(script, weights, tiny, name):
    memory = script("memory")
    way = getattr(memory, name) if name != "TO_DEFAULTS" else memory.TO_DEFAULTS[0]
    section = lambda **changes: memory.MiniGPT4Config(**tiny.section(weights, "bf16", **changes))  # noqa: E731
    estimate = memory.Sized(section, tiny.llm_config(), memory.STAGE_2).estimate(way, 8)
    found = memory.real_step(way, tiny, weights, "bf16", 8)
    assert found == pytest.approx(estimate.weights + estimate.activations, rel=0.1)
    assert all(memory.real_step(way, tiny, weights, "bf16", 1) is None for way in (memory.NF4, *memory.SPREAD))


def test_memory_is_written_down_and_says_what_was_not_measured(script, tmp_path, capsys):
    memory, document = script("memory"), tmp_path / "performance.md"
    assert memory.main(["--size", "tiny", "--batch-size", "2", "--write", str(document)]) == 0
    assert "### Size tiny, batch 2, 204 positions" in document.read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\| (yes|no) \|", line)]
    assert len(rows) == len(memory.TO_DEFAULTS) + len(memory.FURTHER)
    assert all(row.endswith("| not measured yet |") for row in rows)


def test_recipes_come_with_their_memory_and_largest_batch(script):
    memory = script("memory")
    text = memory.batches_section(["minigpt4_flickr_finetune"], [memory.DEFAULTS, memory.NF4], 24)
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| (\d+) \|$", text, re.MULTILINE)
    (plain_gib, plain_batch), (nf4_gib, nf4_batch) = (tuple(map(float, row)) for row in rows)
    assert nf4_gib < plain_gib < 24
    assert 2 < plain_batch < nf4_batch


# Start-up


def test_every_way_loads_the_same_llm_and_is_measured(script, tmp_path, capsys):
    startup, document = script("startup"), tmp_path / "performance.md"
    arguments = ["--size", "tiny", "--repeats", "1", "--dir", str(tmp_path), "--write", str(document)]
    assert startup.main(arguments) == 0
    assert re.findall(r"^\| (.+?) \| \d", capsys.readouterr().out, re.MULTILINE) == STARTS
    assert "loaded by 2 processes" in document.read_text()
    jobs = [startup.Job(way, tmp_path, "bf16", 1) for way in startup.WAYS]
    loads = [startup.unpickled, startup.loaded, startup.loaded]
    models = [load(job, torch.device("cpu"))[0] for load, job in zip(loads, jobs, strict=True)]
    assert len({fingerprint(model) for model in models}) == 1
    first, *others = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    with pytest.raises(RunError, match="a process ended before it had loaded"):
        startup.timed(startup.Job(STARTS[0], tmp_path / "nowhere", "bf16", 2))


# Sections


def test_answers_do_not_depend_on_the_batch(script, tmp_path, capsys):
    short = ["--size", "tiny", "--images", "3", "--timed", "2", "--tokens", "2", "--repeats", "1", "--batch-sizes"]
    benchmark, kept = script("batch_invariant"), str(tmp_path / "said.json")
    assert benchmark.main([*short, "1", "--save", kept]) == 0
    assert benchmark.main([*short, "3", "--against", kept]) == 0
    assert capsys.readouterr().out.count("| 0 of 3 answers, 0 of 3 likelihoods |") == 2


def test_a_section_is_replaced_between_its_marks_or_goes_to_the_end(script, tmp_path):
    tables, document = script("tables"), tmp_path / "performance.md"
    document.write_text("# Performance\n")
    tables.write_section(document, "step", "old\n")
    assert document.read_text() == "# Performance\n\n<!-- step: begin -->\nold\n<!-- step: end -->\n"
    tables.write_section(document, "step", "new \\1\n")
    assert document.read_text() == "# Performance\n\n<!-- step: begin -->\nnew \\1\n<!-- step: end -->\n"
    with pytest.raises(ConfigError, match="nowhere"):
        tables.write_section(tmp_path / "nowhere" / "x.md", "step", "new")


def test_ways_are_measured_in_turn_and_a_ratio_is_the_median_of_the_rounds_own_ratios(script):
    tables, order = script("tables"), []
    seconds = tables.seconds_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert tables.ratio([2.0, 30.0, 4.0], [1.0, 3.0, 1.0]) == 4.0


def test_header_names_machine_commit_and_matrix_rates(script, tmp_path, capsys):
    assert script("header").main(["--write", str(tmp_path / "x.md")]) == 0
    text = (tmp_path / "x.md").read_text()
    assert re.search(r"^\| commit \| ([0-9a-f]{40}|no git checkout)", text, re.MULTILINE)
    assert re.search(r"^\| matrix products in bfloat16, TFLOP/s \| \d+\.\d\d \|$", text, re.MULTILINE)
    assert text.split("\n", 1)[1].startswith(capsys.readouterr().out.splitlines()[0])
