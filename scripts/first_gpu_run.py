"""The first ten minutes on new GPUs: one command, and one Markdown report that says what works, how fast, and what not.

    python scripts/first_gpu_run.py --report first_gpu_run.md       # 1 to 8 GPUs; no weights and no data are needed
    python scripts/first_gpu_run.py --only tiny processes           # only these sections

Runs in a checkout with `pip install -e ".[dev]"`. Tiny recipes train on the test data, and their losses are compared
with those of the CPU; steps of the published recipes run at 7B with random weights, with and without CUDA graphs. A
part that fails is in the report, and the others still run. PYTHON names the interpreter. docs/first_gpu_run_example.md
is what comes out, from a machine without a GPU.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tables import environment, machine, matrix_rate, table  # noqa: E402

PYTHON = shlex.split(os.environ.get("PYTHON", sys.executable))
PASSED, FAILED, SKIPPED = "ok", "FAILED", "skipped"
RECIPES = ("minigpt4_flickr_finetune", "minigpt4_stage2_finetune", "minigpt4_stage1_pretrain")
TIMEOUT = 900
CAPTURED = {"capture_output": True, "text": True, "timeout": TIMEOUT}
FP16 = ("run.amp=True", "model.vit_precision=fp16", "model.llm_precision=fp16")
BF16 = ("run.amp=True", "run.amp_dtype=bf16", "model.vit_precision=bf16", "model.llm_precision=bf16")
WAYS = {
    "fp32": ((), 2e-3),
    "fp16": (FP16, 5e-2),
    "bf16": (BF16, 5e-2),
    "fp16, graph of the vision side": ((*FP16, "model.vit_cuda_graph=True"), 5e-2),
    "fp16, feature cache": ((*FP16, "run.feature_cache=cache"), 5e-2),
    "bf16, recomputation": ((*BF16, "model.llm_grad_checkpoint=True"), 5e-2),
    "nf4": ((*BF16, "model.llm_precision=nf4"), 2e-1),
}
"""Options of a tiny run, and how far its losses may be from those of fp32 on the CPU, relatively."""


class Report:
    """Sections of Markdown; every row begins with what was tried and whether it worked."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.failed: list[str] = []

    def section(self, title: str, head: tuple[str, ...], rows: list[tuple[str, ...]], note: str = "") -> None:
        self.failed += [f"{title}: {row[0]}" for row in rows if FAILED in row]
        self.parts.append(f"## {title}\n\n{note + chr(10) * 2 if note else ''}{table(head, rows)}")

    def text(self) -> str:
        verdict = "Everything that ran worked." if not self.failed else f"FAILED: {'; '.join(self.failed)}."
        return "\n".join([f"# First run on this GPU\n\n{machine()}\n\n{verdict}\n", *self.parts])


def run(*command: str, processes: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A Python script to its end, under torchrun if there are several processes."""
    return subprocess.run(_command(*command, processes=processes), cwd=cwd, env=environment(), **CAPTURED)


def _command(*command: str, processes: int) -> list[str]:
    if processes == 1:
        return [*PYTHON, *command]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, *PYTHON[1:], *command]


def last_words(done: subprocess.CompletedProcess) -> str:
    """Why a command failed, for a cell of a table."""
    lines = [line for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\S*Error|error)\b.*:", line)]
    return " ".join((errors or lines or [f"exit status {done.returncode}"])[-1].split())[:200].replace("|", "\\|")


# Sections


def doctor(report: Report, gpus: int) -> None:
    """What is installed, and whether each card computes."""
    done = subprocess.run([sys.executable, "-m", "minigpt4.doctor"], cwd=ROOT, env=environment(), **CAPTURED)
    report.parts.append(f"## Doctor\n\n```\n{done.stdout.strip() or last_words(done)}\n```\n")
    if done.returncode:
        report.failed.append("Doctor")


class Tiny:
    """The tests' tiny recipe in a folder."""

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location("runner_tests", ROOT / "tests/runners/conftest.py")
        sys.modules["runner_tests"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.recipe = module.make_tiny(self.folder, ROOT / "tests/data/parity").recipe

    def arguments(self, *options: str) -> tuple[str, ...]:
        return (str(ROOT / "train.py"), "--cfg-path", str(self.recipe), "--options", *options)

    def train(self, *options: str, processes: int = 1) -> tuple[subprocess.CompletedProcess, dict[int, float]]:
        """How the run ended, and its losses by step."""
        name = f"run{time.monotonic_ns()}"
        options = (*options, f"run.output_dir={self.folder}/{name}")
        done = run(*self.arguments(*options), processes=processes, cwd=self.folder)
        return done, self.losses(name)

    def losses(self, name: str) -> dict[int, float]:
        files = list((self.folder / name).glob("*/metrics.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines}


def distance(losses: dict[int, float], expected: dict[int, float]) -> float:
    """The largest relative difference; infinite where a step is missing."""
    if not expected or losses.keys() != expected.keys():
        return float("inf")
    return max(abs(losses[step] - loss) / max(abs(loss), 1e-6) for step, loss in expected.items())


def tiny(report: Report, gpus: int) -> None:
    """20 iterations of a tiny recipe on the GPU beside the CPU, in each precision."""
    world, rows = Tiny(), []
    _, expected = world.train("run.device=cpu")
    for name, (options, limit) in WAYS.items():
        if name == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            rows.append((name, SKIPPED, "", "needs bitsandbytes"))
            continue
        done, losses = world.train("run.device=cuda", *options)
        far = distance(losses, expected)
        ok = done.returncode == 0 and far <= limit
        rows.append((name, PASSED if ok else FAILED, f"{far:.1e}", "" if done.returncode == 0 else last_words(done)))
    head = ("precision", "result", "largest relative difference of a loss", "error")
    note = "Losses of 20 iterations of a tiny recipe, beside those of fp32 on this machine's CPU."
    report.section("Tiny recipe on the GPU", head, rows, note)


def processes(report: Report, gpus: int) -> None:
    """DDP, FSDP, kill -9 and resume, over two GPUs if there are two."""
    world, count, rows = Tiny(), min(gpus, 2), []
    runs = {"ddp": (), "fsdp": ("run.parallel=fsdp",)} if count == 2 else {}
    whole = world.train("run.device=cuda", processes=count)[1]
    for name, options in runs.items():
        done, losses = world.train("run.device=cuda", *options, processes=count)
        far = distance(losses, whole)
        ok = done.returncode == 0 and far < 1e-3
        rows.append(
            (f"{name}, {count} GPUs", PASSED if ok else FAILED, f"{far:.1e}", last_words(done) if not ok else "")
        )
    rows += [("ddp, fsdp", SKIPPED, "", "one GPU")] if not runs else []
    rows.append(_killed(world, count, whole))
    head = ("what", "result", "largest relative difference of a loss", "remark")
    note = "Losses beside those of an undisturbed run. Resume is bit-exact where the attention's backward is."
    report.section("Processes and resume", head, rows, note)


def _killed(world: Tiny, count: int, whole: dict[int, float]) -> tuple[str, ...]:
    """Kill one rank in the middle; the launcher must end, and the same command go on."""
    options = ("run.device=cuda", "run.save_every_iters=4", f"run.output_dir={world.folder}/killed")
    command = _command(*world.arguments(*options), processes=count)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
    process = subprocess.Popen(command, cwd=world.folder, **streams, start_new_session=True)
    began = time.monotonic()
    while time.monotonic() - began < TIMEOUT and process.poll() is None:
        if list((world.folder / "killed").glob("*/checkpoint_iter_*.pth")):
            break
        time.sleep(0.05)
    victims = _trainers(process.pid) or [process.pid]
    os.kill(victims[-1], signal.SIGKILL)
    killed = time.monotonic()
    try:
        process.wait(TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - killed
    done = run(*world.arguments(*options, "run.resume_ckpt_path=auto"), processes=count, cwd=world.folder)
    far = distance(world.losses("killed"), whole)
    ok = done.returncode == 0 and far < 1e-3
    remark = f"all ended {seconds:.1f} s after it" if done.returncode == 0 else last_words(done)
    return (f"kill -9 of one of {count}, resume", PASSED if ok else FAILED, f"{far:.1e}", remark)


def _trainers(launcher: int) -> list[int]:
    """Processes of train.py below a launcher."""
    import psutil

    found = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    return [one.pid for one in found if "train.py" in " ".join(one.cmdline()) and "RANK" in one.environ()]


def step(recipe: str, *arguments: str, processes: int = 1) -> dict:
    """What benchmarks/gpu_step.py measures; {"error": ...} if it fails."""
    script = (str(ROOT / "benchmarks/gpu_step.py"), str(ROOT / f"train_configs/{recipe}.yaml"))
    done = run(*script, *arguments, processes=processes)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(found[-1]) if found else {"error": last_words(done)}


def estimated(recipe: str, *arguments: str) -> tuple[float, int]:
    """GiB that `train.py --check` expects of the allocator, and the largest batch that it names."""
    done = run(str(ROOT / "train.py"), "--cfg-path", f"train_configs/{recipe}.yaml", "--check", *arguments)
    gib = dict(re.findall(r"^  (\S.*?)  +([\d.]+) GiB$", done.stdout, re.MULTILINE))
    largest = re.search(r"largest batch that fits is (\d+)", done.stdout)
    return float(gib["total"]) - float(gib["CUDA and allocator"]), int(largest[1]) if largest else 0


def full_size(report: Report, gpus: int) -> None:
    """Steps of the published recipes at 7B: memory beside the estimate, time, share of the card's own rate."""
    rate = matrix_rate(torch.bfloat16, torch.device("cuda"))
    rows = []
    for recipe in RECIPES:
        expected, largest = estimated(recipe)
        for batch, fits in ((None, True), (largest, True), (largest + 1, None)):
            if batch == 0:
                continue
            measured = step(recipe, *(["--batch", str(batch)] if batch else []), "--steps", "10", "--flops")
            rows.append(_row(recipe, measured, expected if batch is None else None, largest, fits, rate))
        rows += _with_graph(recipe, rate)
    if gpus > 1:
        sharded = ("--options", "run.parallel=fsdp")
        expected, largest = estimated(RECIPES[0], "--gpus", str(gpus), *sharded)
        measured = step(RECIPES[0], "--steps", "10", "--flops", *sharded, processes=gpus)
        rows.append(_row(f"{RECIPES[0]}, fsdp on {gpus}", measured, expected, largest, True, rate))
    head = (
        "recipe",
        "batch",
        "result",
        "GiB",
        "--check",
        "s a step",
        "images/s",
        "of bf16 rate",
        "host, ms",
        "waits",
    )
    note = f"Random weights, longest texts. Products of 8192 x 8192 in bf16 reach {rate / 1e12:.0f} TFLOP/s here."
    report.section("Recipes at 7B", head, rows, note)


def _with_graph(recipe: str, rate: float) -> list[tuple]:
    """The recipe with a graph of the vision side, which takes memory of its own, at the largest batch that fits."""
    graph = ("--options", "model.vit_cuda_graph=True")
    _, largest = estimated(recipe, *graph)
    if largest == 0:
        return []
    measured = step(recipe, "--batch", str(largest), "--steps", "10", "--flops", *graph)
    return [_row(f"{recipe}, vit_cuda_graph", measured, None, largest, True, rate)]


def _row(name: str, found: dict, expected: float | None, largest: int, fits: bool | None, rate: float) -> tuple:
    """A row of the table; beyond the largest batch either result is fine."""
    if "error" in found:
        return (name, "", FAILED, found["error"], *[""] * 6)
    full = found["out_of_memory"]
    unexpected = full and fits and found["batch"] <= largest
    off = expected is not None and abs(found["allocated_gib"] / expected - 1) > 0.03
    result = FAILED if unexpected or (off and not full) else "out of memory" if full else PASSED
    if full:
        return (name, str(found["batch"]), result, *[""] * 7)
    return (
        name,
        str(found["batch"]),
        result,
        f"{found['allocated_gib']:.2f}",
        "" if expected is None else f"{expected:.2f}",
        f"{found['seconds']:.3f}",
        f"{found['batch'] / found['seconds']:.1f}",
        f"{found['flops'] / found['seconds'] / rate:.0%}",
        f"{statistics.median(found['host_ms'][2:]):.0f}",
        str(max(found["waits"][2:])),
    )


def answers(report: Report, gpus: int) -> None:
    """Tokens a second of a 7B, with and without cuDNN's attention and a CUDA graph."""
    rows, graph = [], ("--options", "model.llm_cuda_graph=True")
    ways = {"default": (), "without cuDNN attention": ("--no-cudnn-attention",), "llm_cuda_graph": graph}
    for batch in (1, 8):
        for name, switch in ways.items():
            found = step(RECIPES[0], "--tokens", "64", "--batch", str(batch), *switch)
            if "error" in found:
                rows.append((str(batch), name, FAILED, found["error"], ""))
                continue
            speed = f"{batch / found['seconds']:.1f}"
            rows.append((str(batch), name, PASSED, speed, f"{statistics.median(found['host_ms'][2:]):.1f}"))
    report.section("Answers at 7B", ("answers at once", "way", "result", "tokens/s", "host, ms a token"), rows)


def memory(report: Report, gpus: int) -> None:
    """What the allocator reserves for texts of all lengths, with segments that expand and with fixed ones."""
    rows = []
    for name, value in (("expandable (as train.py sets it)", "True"), ("fixed", "False")):
        os.environ["PYTORCH_ALLOC_CONF"] = f"expandable_segments:{value}"
        found = step(RECIPES[1], "--vary", "--batch", "8", "--steps", "20")
        del os.environ["PYTORCH_ALLOC_CONF"]
        result = FAILED if "error" in found else "out of memory" if found["out_of_memory"] else PASSED
        sizes = [f"{found[key]:.2f}" if key in found else "" for key in ("allocated_gib", "reserved_gib")]
        rows.append((name, result, *sizes, found.get("error", "")))
    note = f"20 steps of {RECIPES[1]} at batch 8; the answers have 5 tokens to the longest."
    report.section(
        "Memory where texts vary", ("segments", "result", "allocated, GiB", "reserved, GiB", "error"), rows, note
    )


def graphs(report: Report, gpus: int) -> None:
    """Whether replays of CUDA graphs give the numbers of their kernels, by the tests that need a GPU."""
    pytest = str(Path(importlib.util.find_spec("pytest").origin).with_name("__main__.py"))
    done = run(pytest, "-p", "no:cacheprovider", "tests/models/test_cuda_graph.py")
    skipped = "skipped" in done.stdout
    result = FAILED if done.returncode else SKIPPED if skipped else PASSED
    words = (done.stdout.strip().splitlines() or [last_words(done)])[-1]
    report.section("CUDA graphs", ("what", "result", "tests"), [("replays beside kernels", result, words)])


SECTIONS: dict[str, Callable[[Report, int], None]] = {
    "doctor": doctor,
    "tiny": tiny,
    "graphs": graphs,
    "processes": processes,
    "full_size": full_size,
    "answers": answers,
    "memory": memory,
}


def sections(names: list[str], report: Report, gpus: int) -> Iterator[str]:
    """Run them; what one raises is a failure in the report. Yields the time that each took."""
    for name in names:
        start = time.monotonic()
        try:
            SECTIONS[name](report, gpus)
        except Exception as error:
            report.failed.append(name)
            report.parts.append(f"## {name}\n\n{FAILED}: {type(error).__name__}: {error}\n")
        yield f"{name}: {time.monotonic() - start:.0f} s"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all worked, 1 something did not, 2 there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report", type=Path, default=Path("first_gpu_run.md"), help="file to write (first_gpu_run.md)"
    )
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="only these sections")
    args = parser.parse_args(argv)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        sys.stderr.write("error: torch sees no GPU; python -m minigpt4.doctor says why\n")
        return 2
    report = Report()
    for line in sections(args.only or list(SECTIONS), report, gpus):
        print(line, flush=True)
        args.report.write_text(report.text(), encoding="utf-8")
    print(report.text())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
