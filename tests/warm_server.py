"""Runs scripts of the repository without waiting for their imports: everything is imported once, each request forks.

A line on stdin is a request, a line on stdout its answer, both JSON:
{"argv": [script, ...], "env": {...}, "cwd": str, "path": [folder, ...], "in": file, "out": file, "err": file} -> its id
(a script without .py is the name of a module)
{"poll": process id} -> its exit status, negative for a signal; null while it runs
"""

import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

LATE = (
    *("minigpt4.runners", "minigpt4.tasks", "minigpt4.check", "minigpt4.inference", "minigpt4.evaluation.generate"),
    *("minigpt4.evaluation.report", "minigpt4.evaluation.metrics", "transformers.models.llama.modeling_llama"),
    "omegaconf._impl",
)
"""What scripts import when they need it; the command line names more."""


def start(request):
    """Process id of the new process, which leads a session of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.dup2(os.open(request["in"], os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *request["path"]]
    status = run(sys.argv[0])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking everything that was imported apart again would take longer than the run


def run(script):
    """Exit status as of a process of its own."""
    try:
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def poll(pid):
    """Exit status, None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # makes its table
for module in (*LATE, *sys.argv[1:]):
    importlib.import_module(module)
importlib.import_module("PIL.Image").init()
gc.freeze()  # or each child's collector would look at all that, and copy its pages
for line in sys.stdin:
    request = json.loads(line)
    answer = poll(request["poll"]) if "poll" in request else start(request)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
