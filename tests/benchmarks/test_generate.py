"""`benchmarks/generate.py`: every way says the same, and the section says what was measured."""

import os
import re
import shutil

import pytest

NAMES = [
    "plain",
    "logits at the last position",
    "images together",
    "images together, logits at the last position",
    "our loop, an image at a time",
    "our loop, images together",
]


@pytest.fixture
def generate(script):
    return script("generate")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize("beams", [1, 3])
def test_every_way_is_measured_says_the_same_and_is_written_down(generate, weights, tmp_path, capsys, beams):
    document = tmp_path / "performance.md"
    arguments = ["--size", "tiny", "--images", "3", "--tokens", "2", "12", "--repeats", "1", "--beams", str(beams)]
    assert generate.main([*arguments, "--dir", str(weights), "--write", str(document)]) == 0
    rows = re.findall(r"^\| ([a-z, ]+) \| \d.* \| (\d+) \| \d+ \| 3 of 3 \|$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == NAMES
    assert int(rows[-1][1]) < int(rows[2][1])
    assert f"size tiny, 3 images, beams {beams}" in document.read_text()


def test_compiled_parts_say_the_same_or_the_compiler_is_named(generate, weights, capsys):
    ways = ["our loop, images together", "our loop, images together, compiled"]
    arguments = ["--size", "tiny", "--images", "2", "--tokens", "2", "4", "--repeats", "1", "--dir", str(weights)]
    status = generate.main([*arguments, "--compile", "--only", *ways])
    shown = capsys.readouterr()
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        assert status == 2
        assert "needs a C++ compiler" in shown.err
        return
    assert status == 0
    assert [name for name in ways if f"| {name} |" in shown.out] == ways
    assert shown.out.count("| 2 of 2 |") == 2


def test_answers_that_differ_are_an_error(generate, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate.Work, "_by_our_loop", lambda self, *prompts: [[-1]] * len(prompts[0]))
    arguments = ["--size", "tiny", "--images", "1", "--tokens", "2", "2", "--repeats", "1", "--dir", str(weights)]
    assert generate.main(arguments) == 2
    assert "our loop, an image at a time: 1 of 1 answers are not those of 'plain'" in capsys.readouterr().err
