"""`benchmarks/loader.py`: every way reads the same pictures, and the section says what was measured."""

import re

import pytest
import torch

NAMES = ["plain", "ours"]
STAGES = ["read the file", "read it from a tar", "decode", "resize", "normalise", "collate", "to the main process"]


@pytest.fixture(scope="module")
def files(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    ways = script("loader_ways")
    own = ways.Files(folder / "folder", folder / "shard.tar")
    own.write(ways.pictures(60, 40, 2))
    return own


def test_every_way_is_measured_and_written_down(script, tmp_path, capsys):
    document = tmp_path / "performance.md"
    arguments = ["--sizes", "60x40", "--images", "2", "--batch-size", "2", "--workers", "1", "--repeats", "1"]
    assert script("loader").main([*arguments, "--seconds", "0.01", "--write", str(document)]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^\| 60x40 \| ([a-z_, ]+) \| \d", shown, re.MULTILINE) == NAMES
    assert re.findall(r"^\| ([a-z ]+) \| \d+\.\d+ / \d+\.\d+ \|$", shown, re.MULTILINE) == STAGES
    assert "| this code on a GPU | not measured yet |" in shown
    assert document.read_text().startswith("<!-- loader: begin -->\n## Data workers\n")


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_ways_give_the_same_pictures(script, files, source):
    ways, found = script("loader_ways"), []
    for way in ways.WAYS:
        with ways.batches(way, source, files, 2, 0, torch.device("cpu")) as batches:
            image = next(batches)
        assert image.shape == (2, 3, 224, 224)
        found.append(sorted(image, key=lambda one: one.sum().item()))
    for plain, ours in zip(*found, strict=True):
        # Newer releases of Pillow resize in another order than the published code, which moves pixels by one level.
        torch.testing.assert_close(plain, ours, rtol=0, atol=0.02)


def test_a_size_that_is_none_is_an_error(script, capsys):
    assert script("loader").main(["--sizes", "large"]) == 2
    assert "'large' is not WIDTHxHEIGHT" in capsys.readouterr().err
