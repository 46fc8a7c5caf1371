"""Runs `train.py` without waiting for its imports: everything is imported once, each request forks.

A line on stdin is a request, a line on stdout its answer, both JSON:
{"argv": [...], "env": {...}, "cwd": str, "log": str} -> process id of a process that runs `train.main(argv)`
{"poll": process id} -> its exit status, negative for a signal; null while it runs
"""

import json
import os
import sys
import traceback

import train
from minigpt4 import runners  # noqa: F401  train.py imports it late


def start(request):
    """Process id of the new process."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["train.py", *request["argv"]]
    os._exit(run(request["argv"]))  # taking everything that was imported apart again would take longer than the run


def run(argv):
    """Exit status as of a process of its own."""
    try:
        return train.main(argv)
    except BaseException:
        traceback.print_exc()
        return 1


def poll(pid):
    """Exit status, None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


for line in sys.stdin:
    request = json.loads(line)
    answer = poll(request["poll"]) if "poll" in request else start(request)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
