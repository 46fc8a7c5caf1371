"""A folder has one writer: who comes second learns who is there, and after a kill nobody is."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys

import pytest

from minigpt4.common.errors import RunError
from minigpt4.common.run_folder import FILE, hold_folder

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
        with pytest.raises(RunError) as error:
            hold_folder(tmp_path, "Wait for it.", patience=0)
        assert f"{tmp_path}: is in use by process {process.pid} on " in str(error.value)
        assert "since 20" in str(error.value)
        assert str(error.value).endswith("Wait for it.")
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
