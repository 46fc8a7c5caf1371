"""scripts/download_stage1_images.sh: what it asks of img2dataset."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/download_stage1_images.sh"


def _run(*arguments: str, path: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["/bin/bash", str(SCRIPT), *arguments], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )


@pytest.fixture
def recorder(tmp_path) -> str:
    """A folder with an img2dataset that prints what it was asked: the real one would go to the network."""
    file = tmp_path / "img2dataset"
    file.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    file.chmod(0o755)
    return str(tmp_path)


def test_asks_for_the_published_shards(recorder):
    done = _run("a table.tsv", "laion_dataset", "--timeout", "5", path=recorder)
    asked = done.stdout.split("\n")
    values = dict(zip(asked[::2], asked[1::2], strict=False))
    assert (values["--url_list"], values["--output_folder"]) == ("a table.tsv", "laion_dataset")
    assert (values["--input_format"], values["--url_col"], values["--caption_col"]) == ("tsv", "url", "caption")
    assert (values["--output_format"], values["--image_size"]) == ("webdataset", "224")
    assert values["--number_sample_per_shard"] == "10000"
    assert values["--enable_wandb"] == "False"
    assert values["--timeout"] == "5"


def test_says_how_to_install_img2dataset_and_how_it_is_used(tmp_path, recorder):
    done = _run("a.tsv", "out", path=str(tmp_path / "empty"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install img2dataset" in done.stderr
    done = _run("a.tsv", path=recorder)
    assert done.returncode == 2
    assert "FILE.tsv OUTPUT_FOLDER" in done.stderr
