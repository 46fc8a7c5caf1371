"""scripts/download_stage1_images.sh: what it asks of img2dataset."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/download_stage1_images.sh"


@pytest.fixture
def run(tmp_path):
    """`run(*arguments)`: with an img2dataset that prints what it was asked, as the real one would go to the network."""
    file = tmp_path / "img2dataset"
    file.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    file.chmod(0o755)

    def run(*arguments: str, path: str = str(tmp_path)) -> subprocess.CompletedProcess:
        command = ["/bin/bash", str(SCRIPT), *arguments]
        return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)

    return run


def test_asks_for_the_published_shards(run):
    asked = run("a table.tsv", "laion_dataset", "--timeout", "5").stdout.split("\n")
    values = dict(zip(asked[::2], asked[1::2], strict=False))
    wanted = {"--url_list": "a table.tsv", "--output_folder": "laion_dataset", "--timeout": "5"}
    wanted |= {"--input_format": "tsv", "--url_col": "url", "--caption_col": "caption", "--enable_wandb": "False"}
    wanted |= {"--output_format": "webdataset", "--image_size": "224", "--number_sample_per_shard": "10000"}
    assert values.items() >= wanted.items()


def test_says_how_to_install_img2dataset_and_how_it_is_used(run):
    for done, text in (
        (run("a.tsv", "out", path="/nowhere"), "pip install img2dataset"),
        (run("a.tsv"), "FILE.tsv OUTPUT_FOLDER"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert text in done.stderr
