"""Train and evaluate all rows of an ablation, and write its table.

    python scripts/ablate.py train_configs/ablations/mini.yaml --dry-run
    python scripts/ablate.py train_configs/ablations/mini.yaml --output output/ablations --seeds 0 1 2 --jobs 2
Stages that rows share are trained once. The same command goes on after a kill, and retries what failed.
For a scheduler: --commands prints a command for each row and seed. The plan's format: docs/ablations.md.
"""

import argparse
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minigpt4.ablation import DONE, FAILED, LOG, Evaluation, Job, Stage, Study, read_plan
from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, errors_as, hint
from minigpt4.common.run_folder import FILE, NO_LOCKS, RUN_JSON, locked
from minigpt4.common.utils import exit_status, read_facts, write_json, write_whole

GRACE = 60.0
"""Seconds that a command gets to save and stop."""
LAUNCHER_LINE = re.compile(r"[EW]\d{4} .*torch/distributed|\s*$")


# Doing it


def take(folder: Path) -> int | None:
    """The lock of a job's folder; None if another process works there, or a rank that a killed torchrun left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).touch()
    locks: list[int] = []
    try:
        for path in (folder / FILE, *folder.glob(f"*/{FILE}")):
            if (lock := locked(path)) is None:
                return None
            locks.append(lock)
        return os.dup(locks[0])
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return os.open(os.devnull, os.O_RDONLY)
    finally:
        for lock in locks:
            os.close(lock)


class Queue:
    """Runs jobs, several at once, each when the one before it is done; with `gpus` each slot has its own."""

    def __init__(self, jobs: Sequence[Job], slots: int, gpus: Sequence[str], study: Study) -> None:
        self.waiting, self.gpus, self.study = list(jobs), gpus, study
        self.slots: list[Job | None] = [None] * slots
        self.locks: dict[Path, int] = {}
        self.failed: set[Path] = set()
        self.told: set[Path] = set()

    def run(self) -> None:
        """Until nothing is left that can be done; what fails is noted in its folder."""
        try:
            while self.waiting or any(self.slots):
                for job in list(self.waiting):
                    self._consider(job)
                for slot, job in enumerate(self.slots):
                    if job and job.process.poll() is not None:
                        self._next(slot, job, job.process.returncode)
                time.sleep(0.05)
        except KeyboardInterrupt:
            running = [job.process for job in self.slots if job and job.process]
            for process in running:
                process.terminate()  # training saves and stops
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                process.kill()
            raise

    def _consider(self, job: Job) -> None:
        if job.facts():
            self.waiting.remove(job)
        elif job.before and job.before.folder in self.failed:
            self.waiting.remove(job)
            self.failed.add(job.folder)
        elif None in self.slots and (job.before is None or job.before.facts()):
            with errors_as(RunError, f"--output: {job.folder} cannot be used"):
                lock = take(job.folder)
            if lock is None and job.folder not in self.told:
                say(f"{job.label}: another process works on it; waiting")
                self.told.add(job.folder)
            elif lock is not None and job.facts():  # which the other one has just written
                os.close(lock)
            elif lock is not None:
                self.waiting.remove(job)
                self.locks[job.folder], slot = lock, self.slots.index(None)
                self.slots[slot] = job
                say(f"{job.label}: {job.folder}")
                (job.folder / FAILED).unlink(missing_ok=True)
                job.todo, job.started = job.commands(), time.monotonic()
                self._next(slot, job, 0)

    def _next(self, slot: int, job: Job, status: int) -> None:
        """The next command of a job, or its end."""
        try:
            if status:
                raise RunError(f"exit status {status}: {last_words(job.folder / LOG)}")
            if job.todo:
                self._start(slot, job, job.todo.pop(0))
                return
            seconds = time.monotonic() - job.started
            write_json(job.folder / DONE, job.finish() | {"seconds": round(seconds, 1)})
            say(f"{job.label}: done in {seconds:.0f} s")
        except MiniGPT4Error as error:
            self.failed.add(job.folder)
            write_whole(job.folder / FAILED, f"{error}\n", "--output")
            say(f"{job.label}: failed, {error}; all that it said is in {job.folder / LOG}")
        self.slots[slot] = None
        os.close(self.locks.pop(job.folder))

    def _start(self, slot: int, job: Job, command: list[str]) -> None:
        environment = os.environ | {"WANDB_RUN_GROUP": self.study.path.stem, "WANDB_JOB_TYPE": job.rows[0]}
        environment |= {"CUDA_VISIBLE_DEVICES": self.gpus[slot]} if self.gpus else {}
        with errors_as(RunError, command[0]), (job.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            # The lock is the command's, too: should it outlive this process, the next one waits for it.
            locks = [self.locks[job.folder]]
            job.process = subprocess.Popen(command, **streams, env=environment, pass_fds=locks)


def last_words(log: Path) -> str:
    """The error that the last command of a log names, else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
    lines = [line for line in text.splitlines()[1:] if not LAUNCHER_LINE.match(line)]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].strip()[:300]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# What came out


def lookup(content: Any, way: str) -> Any:
    """The value at the end of a way of keys; LookupError with the key that is not there."""
    for key in way.split("."):
        pairs = content if isinstance(content, dict) else {}
        if isinstance(content, list):
            pairs = {str(number): one for number, one in enumerate(content)}
        if key == "*" and len(pairs) == 1:
            key = next(iter(pairs))
        if key not in pairs:
            raise LookupError(key)
        content = pairs[key]
    return content


def read_column(study: Study, name: str, cell: Sequence[Job]) -> tuple[float | None, list[float] | None]:
    """A number and its interval, None where there is none; ConfigError if its evaluation is done without it."""
    column = study.plan.columns[name]
    evaluation, _, file = column.file.partition("/")
    job = next(job for job in cell if isinstance(job, Evaluation) and job.name == evaluation)
    if not job.facts():
        return None, None
    content, found = read_facts(job.folder / file), []
    for way in (column.key, column.interval):
        try:
            found.append(lookup(content, way) if way else None)
        except LookupError as error:
            where = f"{study.path}: columns.{name}: {way}"
            raise ConfigError(f"{where}: no {error.args[0]!r} in {job.folder / file}") from error
    value, ends = found
    if not isinstance(value, int | float | None):
        raise ConfigError(f"{study.path}: columns.{name}: {column.key}: {value!r:.80} is no number; name its key")
    if value is None or math.isnan(value):  # nothing of the kind was asked
        return None, None
    return value * column.scale, [end * column.scale for end in ends] if ends else None


def describe(study: Study, name: str) -> dict[str, Any]:
    """A row of `table.json`."""
    from minigpt4.models.loading import feature_shape

    row, cells = study.plan.rows[name], [study.cells[name, seed] for seed in study.seeds]
    columns = {column: [read_column(study, column, cell) for cell in cells] for column in study.plan.columns}
    failed = [job for cell in cells for job in cell if job.failure() and not job.facts()]
    done = sum(all(job.facts() for job in cell) for cell in cells)
    stages: dict[str, dict[str, Any]] = {}
    for job in [job for cell in cells for job in cell if isinstance(job, Stage)]:
        batch = job.config.batch_size() * job.processes
        own = stages.setdefault(job.name, {"steps": job.steps, "batch": batch, "losses": [], "hashes": []})
        losses = [line["train_loss"] for line in job.lines("log.txt") if "train_loss" in line]
        own["losses"].append(float(losses[-1]) if job.facts() and losses else None)
        own["hashes"].append(job.key)
    last, tokens = [[job for job in cell if isinstance(job, Stage)][-1] for cell in cells], None
    if known := next((job for job in last if job.facts()), None):
        with suppress(MiniGPT4Error):
            tokens = feature_shape(known.config.model)[0]  # embeddings of an image that the LLM reads
    changes = [*row.options, *(f"without {stage}" for stage in row.without)]
    changes += [f"{key}: {text}" for part in (row.base, row.values) for key, text in part.items()]
    changes += [f"{stage}: {' '.join(own)}" for stage, own in row.stages.items()]
    return {
        "name": name,
        "changes": changes,
        "published": row.published,
        "values": {column: [value for value, _ in pairs] for column, pairs in columns.items()},
        "intervals": {column: [ends for _, ends in pairs] for column, pairs in columns.items()},
        "parameters": known and known.facts()["parameters"],
        "tokens": tokens,
        "stages": stages,
        "configuration": last[0].hash_of(None),
        "state": "failed" if failed else "" if done == len(cells) else f"{done} of {len(cells)} done",
        "failures": [f"{job.name}, seed {job.seed}: {job.failure()} (log: {job.folder / LOG})" for job in failed],
    }


def write_table(study: Study) -> str:
    """All files of the table, of what is there; the Markdown."""
    from minigpt4.evaluation.study import write_study

    jobs = study.jobs(list(study.plan.rows))
    stages = [job for job in jobs if isinstance(job, Stage)]
    git = [read_facts(job.run_folder() / RUN_JSON).get("git") for job in stages]
    content = {
        "plan": study.path.stem,
        "seeds": study.seeds,
        "columns": {name: {"digits": column.digits} for name, column in study.plan.columns.items()},
        "commits": sorted({f"{own['commit']}{', changed' if own['changed'] else ''}" for own in git if own}),
        "rows": [describe(study, name) for name in study.plan.rows],
    }
    curves, timings = [], []
    for job in stages:
        points = [(line["step"], line["loss"]) for line in job.lines() if line["loss"] is not None]
        curves += [(job.name, job.rows, points)] if points else []
    for job in [job for job in jobs if job.facts()]:
        pace, hours, memory = "-", job.facts()["seconds"] / 3600, 0.0
        if isinstance(job, Stage):
            pace, hours = f"{job.pace() or 0.0:.3f}", (job.pace() or 0.0) * job.steps / 3600
            memory = max((line["max_memory_mib"] or 0 for line in job.lines()), default=0) / 1024
        timings.append([job.label, pace, f"{hours:.3f}", f"{memory:.1f}" if memory else "-"])
    return write_study(study.folder, content, curves, timings)


# The command


def show(jobs: Sequence[Any]) -> None:
    """What there is, what is to do, with its commands, and how long that may take."""
    total, unknown = 0.0, 0
    for job in jobs:
        if job.facts():
            print(f"{job.label}: done")
            continue
        like = [other for other in jobs if other.name == job.name and type(other) is type(job)]
        if isinstance(job, Stage):
            step = max((line["step"] + 1 for line in job.lines()), default=0)
            measured = [pace for other in (job, *like) if (pace := other.pace())]
            pace, left, state = next(iter(measured), None), job.steps - step, f"step {step} of {job.steps}"
        else:
            measured = [other.facts()["seconds"] for other in like if other.facts()]
            pace, left, state = sum(measured) / len(measured) if measured else None, 1, "to do"
        time_left = "" if pace is None else f", about {pace * left / 60:.1f} min"
        failure = job.failure()
        print(f"{job.label}: {state}{time_left}{f'; failed: {failure}' if failure else ''}")
        for command in job.commands():
            print(f"    {shlex.join(command)}")
        total, unknown = total + (pace or 0.0) * left, unknown + (pace is None)
    more = f", and {unknown} of which none like it was measured yet" if unknown else ""
    print(f"To do: about {total / 60:.0f} min one after the other{more}")


def gpus_of(jobs: int, processes: int) -> list[str]:
    """`CUDA_VISIBLE_DEVICES` of each slot; empty where the only one may have all, or without GPU. ConfigError if they
    are too few."""
    if jobs == 1:
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if names and jobs * processes > len(names):
        raise ConfigError(f"--jobs: {jobs} jobs of {processes} processes need as many GPUs; there are {len(names)}")
    starts = range(0, jobs * processes if names else 0, processes)
    return [",".join(names[start : start + processes]) for start in starts]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file of rows, seeds, evaluations and columns")
    parser.add_argument("--output", type=Path, default=Path("output/ablations"), help="folder (output/ablations)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="in the place of the plan's")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="train and evaluate these rows alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="at once, each with GPUs of its own (1)")
    parser.add_argument("--dry-run", action="store_true", help="show what is done, all commands, and the time left")
    parser.add_argument("--commands", action="store_true", help="print a command for each row and seed, and stop")
    args = parser.parse_args(argv)
    if args.jobs < 1 or min(args.seeds or [0]) < 0:
        parser.error("--jobs must be at least 1, --seeds at least 0")
    return args


def run(args: argparse.Namespace) -> bool:
    """Whether all that was to be done is done."""
    plan = read_plan(args.plan)
    rows, seeds = (list(dict.fromkeys(chosen)) for chosen in (args.only or plan.rows, args.seeds or plan.seeds))
    for row in rows:
        if row not in plan.rows:
            raise ConfigError(f"{args.plan}: --only {row}: unknown row; {hint(row, plan.rows)}")
    study = Study(args.plan, plan, seeds, args.output)
    jobs, missing = study.jobs(rows), [f"{where}: {path} does not exist" for path, where in study.missing.items()]
    if args.commands:
        own = ["python", "scripts/ablate.py", str(args.plan), "--output", str(args.output)]
        for row, seed in study.cells:
            if row in rows:
                print(shlex.join([*own, "--only", row, "--seeds", str(seed)]))
    elif args.dry_run:
        show(jobs)
        print("".join(f"missing: {fault}\n" for fault in missing), end="")
    elif missing:
        raise ConfigError("\n  - ".join([f"{args.plan}: not found from {Path.cwd()}", *missing]))
    if args.commands or args.dry_run:
        return True
    queue = Queue(jobs, args.jobs, gpus_of(args.jobs, plan.processes), study)
    try:
        queue.run()
    finally:
        text = write_table(study)
    print(f"\n{text}\nEverything is in {study.folder}")
    return not queue.failed


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 something failed, 2 an error to read, 130 stopped by Ctrl-C."""
    args, done = parse_args(argv), []
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in the quickstart: a waiting thread soon gives its core away
    for number in filter(None, (signal.SIGTERM, getattr(signal, "SIGHUP", None))):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, signal.default_int_handler)
    try:
        status = exit_status(lambda: done.append(run(args)))
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on.", file=sys.stderr)
        return 130
    return status or int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
