"""The helper that starts the runs of these tests: what hangs says where, and nothing outlives its test."""

import os
import sys
import time
from pathlib import Path

import pytest

HANGING = """
import os, subprocess, sys, time

def waits_for_its_child():
    code = "def waits_in_a_session_of_its_own(): print('child waits', flush=True); time.sleep(3600)\\nimport time"
    subprocess.run([sys.executable, "-c", code + "\\nwaits_in_a_session_of_its_own()"], start_new_session=True)

print("on standard output", flush=True)
print("before the hang", file=sys.stderr, flush=True)
waits_for_its_child()
"""

LEAVING = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
print(child.pid)
print("to standard error", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def command(tmp_path):
    """How a script is started."""

    def command(script: str) -> dict:
        (tmp_path / "script.py").write_text(script)
        return {"command": [sys.executable, "script.py"], "env": dict(os.environ), "cwd": tmp_path}

    return command


def _is_gone(pid: int) -> bool:
    """Whether the process has ended; init may not have taken note of it yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_command_that_hangs_fails_with_the_stacks_of_all_its_processes(tools, command):
    supervised = tools["supervised"]
    with supervised.started(**command(HANGING)) as process:
        _wait_until(lambda: "child waits" in process.text())
        pids = supervised.marked(process.mark)
        with pytest.raises(pytest.fail.Exception, match="still running after 0 s") as failure:
            process.wait(0.1)
        assert len(pids) == 2
        assert all(map(_is_gone, pids))
    message = str(failure.value)
    for said in ("script.py", "on standard output", "before the hang", "in waits_for_its_child", "s of CPU", "load of"):
        assert said in message
    assert "in waits_in_a_session_of_its_own" in message


def test_command_that_still_runs_at_the_end_of_its_block_is_killed_with_its_processes(tools, command):
    supervised = tools["supervised"]
    with supervised.started(**command(HANGING)) as process:
        _wait_until(lambda: "child waits" in process.text())
        pids = supervised.marked(process.mark)
    assert len(pids) == 2
    assert all(map(_is_gone, pids))


def test_what_a_command_leaves_behind_is_killed(tools, command):
    result = tools["supervised"].run(**command(LEAVING), timeout=60)
    assert result.returncode == 3
    assert result.stderr == "to standard error\n"
    assert _is_gone(int(result.stdout))


def test_command_that_ends_in_time_keeps_its_streams_apart(tools, command):
    script = "import sys; print('one'); print('two', file=sys.stderr)"
    result = tools["supervised"].run(**command(script), timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "one\n", "two\n")
