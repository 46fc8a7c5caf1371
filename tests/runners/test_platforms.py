"""Training where calls of Linux are missing, and workers start as on macOS and Windows: simulated, not run there."""

import os
import signal
from contextlib import closing
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ELSEWHERE = """
import multiprocessing, os, signal, sys
sys.modules["fcntl"] = None
for name in ("sched_getaffinity", "pread", "posix_fadvise"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGHUP", "pthread_sigmask"):
    delattr(signal, name)
multiprocessing.set_start_method("spawn")
print("running elsewhere", file=sys.stderr)
"""
"""A `sitecustomize.py`, which each Python runs first."""


def test_a_run_without_linux_trains_stops_and_resumes_to_the_same_bits(tiny, tools, warm, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sitecustomize.py").write_text(ELSEWHERE)
    environment = tools["environment"]({"PYTHONPATH": os.pathsep.join([str(tmp_path / "elsewhere"), str(REPOSITORY)])})
    options = ("run.num_workers=1", "run.iters_per_epoch=40")
    warm.train(tiny, *options)
    (plain,) = tiny.runs()

    def has_begun() -> bool:
        return len(tiny.runs()) == 2 and (tiny.runs()[1] / "metrics.jsonl").is_file()

    with closing(tools["WarmServer"](tmp_path, environment, tools["supervised"])) as elsewhere:
        stopped = elsewhere.start(tiny, *options)
        tools["until"](has_begun, stopped.abort)
        stopped.send(signal.SIGTERM)
        stopped.wait()
        assert "running elsewhere" in stopped.text()  # as workers say, which are spawned
        assert "no locks" in stopped.text()
        run = tiny.runs()[1]
        assert 0 < len(tools["losses"](run)) < 80
        elsewhere.train(tiny, *options, "run.resume_ckpt_path=auto")
    assert tools["losses"](run) == tools["losses"](plain)
    assert tools["same"](*(tools["weights"](one / "checkpoint_1.pth") for one in (plain, run)))
