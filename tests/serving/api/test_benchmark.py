"""`benchmarks/serve.py` against a server of the tests."""

import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark(load_script):
    """The script as Python starts it: with its folder first on the path."""
    sys.path.insert(0, str(BENCHMARKS))
    yield load_script("benchmarks/serve.py")
    sys.path.remove(str(BENCHMARKS))


def test_both_ways_are_measured_and_reported(benchmark, server, engine, parity_dir, tmp_path, capsys):
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n")
    arguments = ["--url", server.url, "--images", str(parity_dir / "images"), "--requests", "6", "--clients", "3"]
    before = engine.num_running
    assert benchmark.main([*arguments, "--max-tokens", "5", "--write", str(document)]) == 0
    shown = capsys.readouterr().out
    rows = {
        int(found[1]): [float(number) for number in found[2].split("|")]
        for found in re.finditer(r"^\| (\d+) \| ([\d.| ]+) \|$", shown, re.MULTILINE)
    }
    assert set(rows) == {1, 3}
    for requests, tokens, median, high, first, first_high in rows.values():
        assert tokens == pytest.approx(5 * requests, rel=0.02)
        assert 0 < first <= median <= high
        assert first <= first_high
    assert shown.strip() in document.read_text()
    assert engine.num_running == before


def test_a_folder_without_images_is_an_error(benchmark, server, tmp_path, capsys):
    assert benchmark.main(["--url", server.url, "--images", str(tmp_path)]) == 2
    assert "holds no .jpg or .png" in capsys.readouterr().err
