"""The folder of a run: unique, found again, described by run.json, and with one writer at a time."""

import errno
import fcntl
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from minigpt4.common import run_folder
from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.run_folder import FILE, RunFolder, hold_folder


def test_runs_started_together_get_folders_of_their_own_named_by_the_time(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(tmp_path / "output" / "stage2"), range(24)))
    assert len({folder.path for folder in folders}) == 24
    assert all(folder.path.is_dir() and re.fullmatch(r"20\d{6}_\d{6}(_\d+)?", folder.job_id) for folder in folders)
    assert RunFolder.existing(folders[0].path) == folders[0]


@pytest.mark.parametrize("name", ["file", "link", "n" * 300])
def test_folders_that_cannot_be_are_named_with_their_keys(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=rf"run\.output_dir: cannot make .*{name}"):
        RunFolder.create(tmp_path / name)
    with pytest.raises(ConfigError, match=r"none: no such run folder; check run\.resume_ckpt_path"):
        RunFolder.existing(tmp_path / "none")


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
    for epoch, world_size in ((0, 1), (1, 2)):
        folder.note_resume(folder.path / f"checkpoint_{epoch}.pth", world_size=world_size)
    found = folder.facts()
    resumed = [(Path(entry["checkpoint"]).name, entry["world_size"]) for entry in found["resumed"]]
    assert resumed == [("checkpoint_0.pth", 1), ("checkpoint_1.pth", 2)]
    assert {**found, "resumed": []} == facts


def test_run_json_names_the_commit_and_whether_files_differ_from_it(tmp_path):
    file = shutil.copy(run_folder.__file__, tmp_path)
    spec = importlib.util.spec_from_file_location("run_folder_of_a_checkout", file)
    spec.loader.exec_module(copied := importlib.util.module_from_spec(spec))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "of others"], ["add", "."]):
        assert copied.git_state() is None
        subprocess.run([*git, *arguments], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "untracked.log").touch()
    for changed in (False, True):
        assert copied.git_state() == {"commit": commit, "changed": changed}
        (tmp_path / "run_folder.py").write_text("")


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
    last, other = start("20190101_000000"), RunFolder(tmp_path / "20260101_000000")
    assert other.facts() == {}
    for folder in (last, other):
        folder.note_resume(tmp_path / "checkpoint_0.pth", world_size=1)
        assert len(folder.facts()["resumed"]) == 1
    assert last.facts()["number"] == 3


# One writer at a time

HOLD = """
import multiprocessing, pathlib, sys, time
from minigpt4.common.run_folder import hold_folder
hold_folder(pathlib.Path(sys.argv[1]), "Wait.")
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
worker.start()
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_the_second_learns_who_holds_it_and_after_kill_9_it_is_free_though_a_worker_lives_on(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        held = f"{tmp_path}: is in use by process {process.pid} on .*since 20.*Wait for it\\.$"
        with pytest.raises(RunError, match=held):
            hold_folder(tmp_path, "Wait for it.", patience=0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(worker, 0)
        hold_folder(tmp_path, "", patience=10)  # the kernel may take a moment to close the files of the dead
        hold_folder(tmp_path, "")  # the same process may ask again
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        hold_folder(tmp_path, "")
    assert f"{tmp_path}: its file system has no locks" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    with pytest.raises(RunError, match=f"none/{FILE}: cannot be written"):
        hold_folder(tmp_path / "none", "")


def test_where_a_lock_needs_a_file_that_is_open_for_writing_it_gets_one(tmp_path, monkeypatch):
    """As on NFS."""
    flock = fcntl.flock

    def of_nfs(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    hold_folder(tmp_path, "")
    with (tmp_path / FILE).open() as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_forked_worker_does_not_take_itself_for_the_holder(tmp_path):
    hold_folder(tmp_path, "")
    if not (child := os.fork()):
        try:
            hold_folder(tmp_path, "", patience=0)
            os._exit(0)
        except RunError:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
