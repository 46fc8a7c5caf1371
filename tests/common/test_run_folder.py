"""The folder of a run: unique, found again, and described by run.json."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from minigpt4.common.errors import ConfigError
from minigpt4.common.run_folder import RunFolder

REPOSITORY = Path(__file__).parents[2]


def test_runs_started_together_get_folders_of_their_own_named_by_the_time(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(tmp_path / "output" / "stage2"), range(24)))
    assert len({folder.path for folder in folders}) == 24
    assert all(folder.path.is_dir() and re.fullmatch(r"20\d{6}_\d{6}(_\d+)?", folder.job_id) for folder in folders)
    assert RunFolder.existing(folders[0].path) == folders[0]


def test_folders_that_cannot_be_are_named_with_their_keys(tmp_path):
    (tmp_path / "output").write_text("")
    with pytest.raises(ConfigError, match=r"run\.output_dir: cannot make .*output.*: Not a directory"):
        RunFolder.create(tmp_path / "output")
    with pytest.raises(ConfigError, match=r"20250608_111442: no such run folder; check run\.resume_ckpt_path"):
        RunFolder.existing(tmp_path / "20250608_111442")


def test_run_json_says_what_ran_and_what_it_went_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--cfg-path", "a file.yaml"])
    folder = RunFolder.create(tmp_path)
    folder.describe({"run": {"init_lr": 3e-5}, "model": {"ckpt": Path("weights/é.pth")}}, seed=42, world_size=4)
    facts = json.loads(folder.run_json.read_text(encoding="utf-8"))
    assert facts == folder.facts()
    assert facts["config"] == {"run": {"init_lr": 3e-5}, "model": {"ckpt": "weights/é.pth"}}
    assert (facts["seed"], facts["world_size"], facts["job_id"]) == (42, 4, folder.job_id)
    assert facts["command"].endswith("train.py --cfg-path 'a file.yaml'")
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["started"].endswith("+00:00")
    folder.note_resume(folder.path / "checkpoint_0.pth", world_size=1)
    folder.note_resume(folder.path / "checkpoint_1.pth", world_size=2)
    resumed = folder.facts()["resumed"]
    assert {**folder.facts(), "resumed": []} == facts
    assert [(Path(entry["checkpoint"]).name, entry["world_size"]) for entry in resumed] == [
        ("checkpoint_0.pth", 1),
        ("checkpoint_1.pth", 2),
    ]


def test_run_json_names_the_commit_and_whether_files_differ_from_it(tmp_path):
    package = tmp_path / "copy" / "minigpt4"
    shutil.copytree(REPOSITORY / "minigpt4", package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "copy/.gitignore").write_text("__pycache__\n")
    git = ["git", "-C", str(tmp_path / "copy"), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    code = "import json; from minigpt4.common.run_folder import git_state; print(json.dumps(git_state()))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "copy")}
    for changed in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True
        )
        assert json.loads(done.stdout) == {"commit": commit, "changed": changed}
        (package / "__init__.py").write_text('__version__ = "0"\n')


def test_runs_are_numbered_whatever_the_clock_and_other_files_say(tmp_path):
    def start(name):
        (tmp_path / name).mkdir()
        folder = RunFolder.existing(tmp_path / name)
        folder.describe({}, seed=1, world_size=1)
        return folder

    assert start("20260101_000000").facts()["number"] == 1
    assert start("20200101_000000").facts()["number"] == 2
    (tmp_path / "20260101_000000" / "run.json").write_text('{"number": "many", "started": 5, "resumed": 7}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"number": 70')
    last = start("20190101_000000")
    last.note_resume(tmp_path / "checkpoint_0.pth", world_size=1)
    assert last.facts()["number"] == 3
    other = RunFolder(tmp_path / "20260101_000000")
    assert other.facts() == {}
    other.note_resume(tmp_path / "checkpoint_0.pth", world_size=1)
    assert len(other.facts()["resumed"]) == 1
