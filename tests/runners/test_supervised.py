"""The helper that starts the runs of these tests: what hangs says where, and nothing outlives its test."""

import os
import sys
import time

import psutil
import pytest

HANGING = """
import subprocess, sys

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


def _command(tmp_path, script: str) -> dict:
    (tmp_path / "script.py").write_text(script)
    return {"command": [sys.executable, "script.py"], "env": dict(os.environ), "cwd": tmp_path}


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("waits", [True, False])
def test_command_that_hangs_ends_with_all_its_processes_and_their_stacks(tools, tmp_path, waits):
    supervised = tools["supervised"]
    with supervised.started(**_command(tmp_path, HANGING)) as process:
        end = time.monotonic() + 60
        while "child waits" not in process.text() and time.monotonic() < end:
            time.sleep(0.01)
        found = supervised.marked(process.mark)
        if waits:
            with pytest.raises(pytest.fail.Exception, match="still running after 0 s") as failure:
                process.wait(0.1)
            said = (
                "script.py",
                "on standard output",
                "before the hang",
                "in waits_for_its_child",
                "s of CPU",
                "load of",
            )
            for text in (*said, "in waits_in_a_session_of_its_own"):
                assert text in str(failure.value)
    assert len(found) == 2
    assert all(map(_gone, found))


def test_what_a_command_leaves_behind_is_killed_and_its_streams_are_kept_apart(tools, tmp_path):
    result = tools["supervised"].run(**_command(tmp_path, LEAVING), timeout=60)
    assert result.returncode == 3
    assert result.stderr == "to standard error\n"
    left = int(result.stdout)
    assert not psutil.pid_exists(left) or _gone(psutil.Process(left))
