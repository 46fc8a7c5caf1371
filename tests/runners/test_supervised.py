"""The helper that starts the runs of these tests: what hangs says where, and nothing outlives its test."""

import os
import sys
from contextlib import suppress

import psutil
import pytest

HANGING = """
import subprocess, sys, time

def waits_for_its_child():
    code = "def waits_in_a_session_of_its_own(): print('child waits', flush=True); time.sleep(3600)\\nimport time"
    subprocess.run([sys.executable, "-c", code + "\\nwaits_in_a_session_of_its_own()"], start_new_session=True)

print("on standard output", flush=True)
print("before the hang", file=sys.stderr, flush=True)
waits_for_its_child()
"""
LEAVING = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
print(child.pid)
print("to standard error", file=sys.stderr)
sys.exit(3)
"""
SAID = ("on standard output", "before the hang", "in waits_for_its_child", "s of CPU", "load of")


def test_command_that_hangs_ends_with_the_stacks_of_all_its_processes(tools, tmp_path):
    supervised = tools["supervised"]
    with supervised.started([sys.executable, "-c", HANGING], env=dict(os.environ), cwd=tmp_path) as process:
        tools["until"](lambda: "child waits" in process.text(), process.text)
        assert len(supervised.marked(process.mark)) == 2
        with pytest.raises(pytest.fail.Exception, match="still running after 0 s") as failure:
            process.wait(0.1)
    for text in (*SAID, "in waits_in_a_session_of_its_own"):
        assert text in str(failure.value)
    assert not supervised.marked(process.mark)


def test_what_a_command_leaves_behind_is_killed_and_its_streams_are_kept_apart(tools, tmp_path):
    command = [sys.executable, "-c", LEAVING]
    result = tools["supervised"].run(command, env=dict(os.environ), cwd=tmp_path, timeout=60)
    assert result.returncode == 3
    assert result.stderr == "to standard error\n"
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(result.stdout)).status() == psutil.STATUS_ZOMBIE
