"""`benchmarks/startup.py`: every way loads the same LLM into all processes, and the section says what was measured."""

import re

import pytest
import torch

from minigpt4.common.errors import RunError
from minigpt4.models.llm import fingerprint

WAYS = ["unpickled in each process", "`load_llm`, `.bin`", "`load_llm`, safetensors"]


@pytest.fixture(scope="module")
def startup(script):
    return script("startup")


@pytest.fixture(scope="module")
def folder(startup, tmp_path_factory):
    """Both forms of a tiny LLM."""
    path = tmp_path_factory.mktemp("startup")
    startup.prepare(path, "tiny", "bf16")
    return path


def test_every_way_is_measured_and_written_down(startup, folder, tmp_path, capsys):
    document = tmp_path / "performance.md"
    assert startup.main(["--size", "tiny", "--repeats", "1", "--dir", str(folder), "--write", str(document)]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^\| (.+?) \| \d", shown, re.MULTILINE) == WAYS
    assert "loaded by 2 processes" in document.read_text()


def test_all_ways_load_the_same_llm(startup, folder):
    device = torch.device("cpu")
    models = [load(startup.Job(way, folder, "bf16", 1), device)[0] for way, load in startup.WAYS.items()]
    assert list(startup.WAYS) == WAYS
    assert len({fingerprint(model) for model in models}) == 1
    first, *others = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_process_that_fails_ends_the_measurement(startup, tmp_path):
    with pytest.raises(RunError, match="a process ended before it had loaded"):
        startup.measured(startup.Job(WAYS[0], tmp_path / "nowhere", "bf16", 2))
