"""`benchmarks/run_all.sh` calls every benchmark with arguments that it takes, and outlives one that fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "run_all.sh"

# Stands for the interpreter: notes its arguments, fails for the benchmark of FAILS, says whether there is a GPU.
RECORDER = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "-c":
    print(os.environ["GPU"])
    sys.exit(0)
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit("error: out of order" if os.environ["FAILS"] in sys.argv[1] else 0)
"""


@pytest.fixture
def run_all(tmp_path):
    """`run_all(*arguments)`: the finished process, and what it called: (benchmark, arguments)."""
    recorder = tmp_path / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)

    def run(*arguments: str, fails: str = "none", gpu: str = "", weights: str = ""):
        calls = tmp_path / "calls.jsonl"
        own = {"PYTHON": str(recorder), "CALLS": str(calls), "FAILS": fails, "GPU": gpu, "WEIGHTS": weights}
        command = ["bash", str(SCRIPT), *arguments]
        process = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=60)
        lines = calls.read_text().splitlines() if calls.exists() else []
        called = [json.loads(line) for line in lines]
        calls.unlink(missing_ok=True)
        return process, [(Path(file).stem, rest) for file, *rest in called]

    return run


@pytest.fixture
def parsed(script, load_script):
    """`parsed(name, arguments)`: what the benchmark makes of them. By its file: the repository has another serve.py."""
    script("tables")
    return lambda name, arguments: load_script(f"benchmarks/{name}.py").parse_args(arguments)


def writers() -> set[str]:
    """Scripts that write a section."""
    return {path.stem for path in BENCHMARKS.glob("*.py") if "return measured(" in path.read_text()}


@pytest.mark.parametrize(("gpu", "fails"), [("", "generate"), ("yes", "none")])
def test_every_benchmark_that_writes_a_section_is_called_with_arguments_that_it_takes(gpu, fails, run_all, parsed):
    """Also if one fails, which the status tells; a GPU measures memory."""
    process, called = run_all(gpu=gpu, fails=fails, weights="/tmp/7b")
    assert {name for name, _ in called} == writers()
    for name, rest in called:
        assert parsed(name, rest).write == Path("docs/performance.md")
    memory = dict(called)["memory"]
    assert ("--measure" in memory) is ("/tmp/7b" in memory) is bool(gpu)
    assert process.returncode == (fails != "none"), process.stderr
    said = re.search(r"error: these failed.*: generate generate$", process.stderr, re.MULTILINE)
    assert bool(said) is (fails != "none")


def test_a_smoke_run_takes_the_smallest_sizes_and_writes_elsewhere(run_all, parsed, tmp_path):
    process, called = run_all("--fast", str(tmp_path / "all.md"))
    assert process.returncode == 0, process.stderr
    assert {name for name, _ in called} == writers() - {"evaluate", "serve"}  # which need trained weights
    for name, rest in called:
        args = parsed(name, rest)
        assert args.write == tmp_path / "all.md"
        assert getattr(args, "size", "tiny") == "tiny"
        assert getattr(args, "repeats", 1) == 1


def test_other_arguments_are_refused(run_all):
    for arguments in (["--fast"], ["--slow", "x.md"], ["--fast", "x.md", "y"]):
        process, called = run_all(*arguments)
        assert (process.returncode, called) == (2, [])
        assert "usage:" in process.stderr
