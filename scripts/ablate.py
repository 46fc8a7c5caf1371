"""Train and evaluate all rows of an ablation, and write its table.

    python scripts/ablate.py train_configs/ablations/mini.yaml --dry-run
    python scripts/ablate.py train_configs/ablations/mini.yaml --output output/ablations --seeds 0 1 2 --jobs 2
Stages that rows share are trained once. The same command goes on after a kill, and retries what failed.
For a scheduler: --commands prints a command for each row and seed. The plan's format: docs/ablations.md.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Le, MinLen
from pydantic import BeforeValidator

from minigpt4.common.binding import NonNegativeInt, PositiveFloat, PositiveInt, missing_paths, raise_faults, read
from minigpt4.common.config import Config
from minigpt4.common.config_files import load_yaml, to_plain
from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, errors_as, hint
from minigpt4.common.run_folder import FILE, NO_LOCKS, RUN_JSON, locked
from minigpt4.common.utils import JsonLines, exit_status, read_facts, write_json, write_whole

ROOT = Path(__file__).resolve().parents[1]
DONE, FAILED, LOG = "done.json", "failed.txt", "output.txt"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LAUNCHER_LINE = re.compile(r"[EW]\d{4} .*torch/distributed|\s*$")
PLACE = re.compile(r"(?<!\$)\{([a-z_][a-z0-9_]*)\}")
OWN_KEYS = ("run.seed", "run.output_dir", "run.resume_ckpt_path")
UNHASHED = ("seed", "output_dir", "resume_ckpt_path", "job_name", "wandb_log", "tensorboard_log")
"""Keys of `run:` that say nothing about what is trained, or are said apart."""

Names = dict[str, str]
Options = list[str]
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


# The plan


@dataclass
class Column:
    """A column of the table: a number in a JSON file that an evaluation writes."""

    file: str
    """`EVALUATION/FILE.json`."""
    key: str
    """The way to it, with dots between: `checkpoints.0.scores.CIDEr`; `*` stands for the only one there."""
    interval: str | None = None
    """The way to its 95% interval, a list of two."""
    scale: PositiveFloat = 1.0
    """100 makes shares percentages."""
    digits: Annotated[NonNegativeInt, Le(9)] = 2


@dataclass
class Row:
    """A row of the table; the first is the default."""

    options: Options = field(default_factory=list)
    """`KEY=VALUE`, as for train.py, of all stages; those of `model.` also where an evaluation says `{options}`."""
    stages: dict[str, Options] = field(default_factory=dict)
    """The same of single stages."""
    base: Names = field(default_factory=dict)
    """Other recipes of stages."""
    without: list[str] = field(default_factory=list)
    """Stages that are left out."""
    values: Names = field(default_factory=dict)
    """Other `values`."""
    published: dict[str, float] = field(default_factory=dict)
    """Published numbers, by column."""


@dataclass
class Plan:
    """What is compared. Options and commands may hold `{NAME}` of `values`, and `{row}`."""

    base: Annotated[Names, MinLen(1)]
    """Recipe of each stage, in order; each starts from the last checkpoint of the one before."""
    rows: Annotated[dict[str, Any], MinLen(1)]
    """By name; see Row."""
    seeds: Annotated[list[NonNegativeInt], MinLen(1)]
    evaluate: dict[str, Texts]
    """Commands by name, also with `{checkpoint}`, `{run}` (its folder), `{output}` (another), `{seed}`, `{options}`."""
    columns: dict[str, Any]
    """By name; see Column."""
    options: Options = field(default_factory=list)
    """Of all rows, as in a row; so are `stages` and `values`."""
    stages: dict[str, Options] = field(default_factory=dict)
    values: Names = field(default_factory=dict)
    processes: PositiveInt = 1
    """Of a training run, one for each GPU."""


def read_plan(path: Path) -> Plan:
    """The plan in a file; ConfigError with all its faults."""
    plan, faults = read(Plan, to_plain(load_yaml(path), str(path)), "plan")
    faults = [fault.removeprefix("plan.") for fault in faults]
    for name, schema in (("rows", Row), ("columns", Column)):
        sections = getattr(plan, name) if plan else {}
        for key, own in sections.items():
            sections[key], found = read(schema, {} if own is None else own, f"{name}.{key}")
            faults += found
    raise_faults(str(path), faults or list(_contradictions(plan)))
    return plan


def _contradictions(plan: Plan) -> Iterator[str]:
    """Names that nothing has, and options that this command sets."""
    known = {"stages": plan.base, "base": plan.base, "without": plan.base, "values": plan.values}
    known["published"] = plan.columns
    for place, own in [("", plan), *((f"rows.{name}.", row) for name, row in plan.rows.items())]:
        used = [(f"{place}{key}", name, names) for key, names in known.items() for name in getattr(own, key, ())]
        yield from _unknown(used)
        for key, pairs in [
            ("options", own.options),
            *((f"stages.{name}", given) for name, given in own.stages.items()),
        ]:
            taken = [pair for pair in pairs if pair.partition("=")[0] in OWN_KEYS]
            yield from (f"{place}{key}: {pair}: is set for each run; leave it out" for pair in taken)
        if set(plan.base) <= set(getattr(own, "without", ())):
            yield f"{place}without: leaves no stage"
    yield from _unknown((f"columns.{n}.file", c.file.partition("/")[0], plan.evaluate) for n, c in plan.columns.items())


def _unknown(used: Any) -> Iterator[str]:
    yield from (f"{key}: unknown name {name!r}; {hint(name, known)}" for key, name, known in used if name not in known)


def fill(text: str, values: Mapping[str, str], where: str) -> str:
    """`text` with `values` in the places of their `{NAME}`; ConfigError for an unknown one."""
    if unknown := next((name for name in PLACE.findall(text) if name not in values), None):
        raise ConfigError(f"{where}: {{{unknown}}} is unknown; {hint(unknown, values)}")
    return PLACE.sub(lambda found: values[found[1]], text)


# What there is to do


@dataclass
class Job:
    """A stage to train or an evaluation, in a folder that is named by all that it depends on."""

    name: str
    seed: int
    before: "Stage | None"
    root: Path
    where: str
    """In the plan, for errors."""

    def __post_init__(self) -> None:
        self.rows: list[str] = []
        self.todo: list[list[str]] = []
        self.process: subprocess.Popen | None = None

    @property
    def folder(self) -> Path:
        return self.root / f"{self.name}-{self.key}"

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed} ({', '.join(self.rows)})"

    def facts(self) -> dict[str, Any]:
        """What `done.json` says; empty if it is not done."""
        return read_facts(self.folder / DONE)

    def failure(self) -> str | None:
        """Why the last try failed."""
        with suppress(OSError):
            return (self.folder / FAILED).read_text(encoding="utf-8").strip()
        return None

    def finish(self) -> dict[str, Any]:
        """Facts to keep when all commands ended well; RunError if it is not done all the same."""
        return {}


@dataclass
class Stage(Job):
    """A training run: a recipe with options and seed, from the checkpoint of the stage before."""

    config: Config
    options: Options
    processes: int

    def hash_of(self, seed: int | None) -> str:
        """Of all that is trained, the stages before included; None: whatever the seed."""
        merged = copy.deepcopy(self.config.merged)
        for key in UNHASHED:
            merged["run"].pop(key, None)
        if self.before:
            merged["model"]["ckpt"] = self.before.hash_of(seed)
        text = json.dumps([merged, seed, self.processes], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def key(self) -> str:
        return self.hash_of(self.seed)

    @property
    def steps(self) -> int:
        return self.config.run.max_epoch * self.config.run.iters_per_epoch

    def checkpoint(self) -> Path:
        """Its last one; before it is there, a name that says so."""
        return self.folder / self.facts().get("checkpoint", f"JOB_ID/checkpoint_{self.config.run.max_epoch - 1}.pth")

    def commands(self) -> list[list[str]]:
        own = [f"run.seed={self.seed}", f"run.output_dir={self.folder}", "run.resume_ckpt_path=auto"]
        own += [f"model.ckpt={self.before.checkpoint()}"] if self.before else []
        script = "train.py" if Path.cwd() == ROOT else str(ROOT / "train.py")
        # One process equals torchrun with one, and no kill leaves it behind.
        several = [*TORCHRUN, "--standalone", f"--nproc-per-node={self.processes}"]
        launcher = several if self.processes > 1 else [sys.executable]
        return [[*launcher, script, "--cfg-path", self.config.source, "--options", *self.options, *own]]

    def finish(self) -> dict[str, Any]:
        from minigpt4.common.checkpoint import newest_checkpoint, read_card

        checkpoint = newest_checkpoint(self.folder, self.config.run.job_name)
        card = checkpoint and read_card(checkpoint)
        if not card or card["iteration"] < self.steps:
            raise RunError("training stopped before its end; the same command goes on")
        parameters = sum(math.prod(shape) for shape in card["trained"].values())
        return {"checkpoint": str(checkpoint.relative_to(self.folder)), "parameters": parameters}

    def lines(self, name: str = "metrics.jsonl") -> list[Mapping[str, Any]]:
        """Of a log of its run."""
        return [line for file in sorted(self.folder.glob(f"*/{name}")) for line in JsonLines(file).read()]


@dataclass
class Evaluation(Job):
    """Commands, one after the other, that ask a checkpoint."""

    templates: list[str]
    values: Names
    options: Options

    @cached_property
    def key(self) -> str:
        """The checkpoint's hash stands for its path."""
        text = json.dumps([self.before.key, self._filled(Path(self.before.key), "OUTPUT")])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def commands(self) -> list[list[str]]:
        programs = {"python": [sys.executable], "torchrun": TORCHRUN}
        filled = self._filled(self.before.checkpoint(), str(self.folder))
        return [[*programs.get(first, [first]), *words] for first, *words in filled]

    def _filled(self, checkpoint: Path, output: str) -> list[list[str]]:
        own = {"checkpoint": str(checkpoint), "run": str(checkpoint.parent), "output": output, "seed": str(self.seed)}
        values = {**self.values, **own, "options": ""}
        commands = []
        for template in self.templates:
            words = [self.options if word == "{options}" else [word] for word in shlex.split(template)]
            commands.append([fill(word, values, self.where) for some in words for word in some])
        return commands

    def missing(self) -> list[str]:
        """Scripts and configurations that its commands name and that are not there."""
        files = [word for command in self._filled(Path("RUN/CKPT"), "RUN") for word in command]
        files = [word for word in files if word.endswith((".py", ".yaml")) and not word.startswith("RUN")]
        return [file for file in files if not Path(file).exists()]


class Study:
    """A plan with its seeds, and where its results are.

    `cells`: by row and seed its stages and then its evaluations; equal jobs are one object. `missing`: what is not
    there, with the first place in the plan that wants it.
    """

    def __init__(self, path: Path, plan: Plan, seeds: list[int], output: Path) -> None:
        self.path, self.plan, self.seeds, self.output = path, plan, seeds, output
        self.folder = output / path.stem
        self._jobs: dict[Path, Job] = {}
        self.missing: dict[str, str] = {}
        self.cells: dict[tuple[str, int], list[Job]] = {}
        for name, row in plan.rows.items():
            self._add_row(name, row, {**plan.values, **row.values, "row": name})

    def _add_row(self, name: str, row: Row, values: Names) -> None:
        where = f"{self.path}: rows.{name}"
        stages = [stage for stage in self.plan.base if stage not in row.without]
        read = [self._read(stage, row, values, where, is_first=stage == stages[0]) for stage in stages]
        asked = [fill(pair, values, where) for pair in (*self.plan.options, *row.options) if pair.startswith("model.")]
        for seed in self.seeds:
            before, cell = None, []
            for stage, own in zip(stages, read, strict=True):
                job = Stage(stage, seed, before, self.output / "runs", where, *own, self.plan.processes)
                cell.append(before := self._shared(job, name))
            for key, templates in self.plan.evaluate.items():
                place = self.output / "evaluations", f"{self.path}: evaluate.{key}"
                job = Evaluation(key, seed, before, *place, templates, values, asked)
                self.missing |= {file: job.where for file in job.missing() if file not in self.missing}
                cell.append(self._shared(job, name))
            self.cells[name, seed] = cell

    def _shared(self, job: Job, row: str) -> Any:
        job = self._jobs.setdefault(job.folder, job)
        job.rows += [row] if row not in job.rows else []
        return job

    def _read(self, stage: str, row: Row, values: Names, where: str, is_first: bool) -> tuple[Config, Options]:
        plan, where = self.plan, f"{where}, {stage}"
        given = [*plan.options, *plan.stages.get(stage, []), *row.options, *row.stages.get(stage, [])]
        options = [fill(pair, values, f"{where}: {pair}") for pair in given]
        recipe = fill(row.base.get(stage, plan.base[stage]), values, where)
        try:
            config = Config(argparse.Namespace(cfg_path=recipe, options=options)).validate()
        except MiniGPT4Error as error:
            raise ConfigError(f"{where}: {error}") from error
        missing = [(key, path) for key, path in missing_paths(config.sections()) if is_first or key != "model.ckpt"]
        for key, path in missing:
            self.missing.setdefault(f"{key}: {path}", where)
        return config, options

    def jobs(self, rows: Sequence[str]) -> list[Any]:
        """Those of some rows, once, seed by seed, stages before what they are for."""
        found = [job for seed in self.seeds for row in rows for job in self.cells[row, seed]]
        return list({job.folder: job for job in found}.values())


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
                process.wait()
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
            elif lock is not None and not job.facts():  # which the other one may just have written
                self.waiting.remove(job)
                self.locks[job.folder], slot = lock, self.slots.index(None)
                self.slots[slot] = job
                say(f"{job.label}: {job.folder}")
                (job.folder / FAILED).unlink(missing_ok=True)
                job.todo, job.started = job.commands(), time.monotonic()
                self._next(slot, job, 0)

    def _next(self, slot: int, job: Job, status: int) -> None:
        """The next command of a job, or its end."""
        if status == 0 and job.todo:
            environment = os.environ | {"WANDB_RUN_GROUP": self.study.path.stem, "WANDB_JOB_TYPE": job.rows[0]}
            environment |= {"CUDA_VISIBLE_DEVICES": self.gpus[slot]} if self.gpus else {}
            command = job.todo.pop(0)
            with (job.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(f"$ {shlex.join(command)}\n")
                log.flush()
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                # The lock is the command's, too: should it outlive this process, the next one waits for it.
                locks = [self.locks[job.folder]]
                job.process = subprocess.Popen(command, **streams, env=environment, pass_fds=locks)
            return
        try:
            if status:
                raise RunError(f"exit status {status}: {last_words(job.folder / LOG)}")
            seconds = time.monotonic() - job.started
            write_json(job.folder / DONE, job.finish() | {"seconds": round(seconds, 1)})
            say(f"{job.label}: done in {seconds:.0f} s")
        except MiniGPT4Error as error:
            self.failed.add(job.folder)
            write_whole(job.folder / FAILED, f"{error}\n", "--output")
            say(f"{job.label}: failed, {error}; all that it said is in {job.folder / LOG}")
        self.slots[slot] = None
        os.close(self.locks.pop(job.folder))


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
    if value is None or math.isnan(value):  # nothing of the kind was asked
        return None, None
    return value * column.scale, [end * column.scale for end in ends] if ends else None


def describe(study: Study, name: str) -> dict[str, Any]:
    """A row of `table.json`."""
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
    last = [[job for job in cell if isinstance(job, Stage)][-1] for cell in cells]
    known = next((job for job in last if job.facts()), None)
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
        "tokens": known and tokens_of(known.config),
        "stages": stages,
        "configuration": last[0].hash_of(None),
        "state": "failed" if failed else "" if done == len(cells) else f"{done} of {len(cells)} done",
        "failures": [f"{job.name}, seed {job.seed}: {job.failure()} (log: {job.folder / LOG})" for job in failed],
    }


def tokens_of(config: Config) -> int | None:
    """Embeddings of an image that the LLM reads."""
    from minigpt4.models.loading import feature_shape

    with suppress(MiniGPT4Error):
        return feature_shape(config.model)[0]
    return None


def write_table(study: Study) -> str:
    """All files of the table, of what is there; the Markdown."""
    from minigpt4.evaluation.study import write_study

    jobs = study.jobs(list(study.plan.rows))
    stages = [job for job in jobs if isinstance(job, Stage)]
    git = [read_facts(file).get("git") for job in stages for file in sorted(job.folder.glob(f"*/{RUN_JSON}"))]
    content = {
        "plan": study.path.stem,
        "seeds": study.seeds,
        "columns": {name: {"digits": column.digits} for name, column in study.plan.columns.items()},
        "commits": sorted({f"{own['commit']}{', changed' if own['changed'] else ''}" for own in git if own}),
        "rows": [describe(study, name) for name in study.plan.rows],
    }
    curves = [(job.name, job.rows, [(line["step"], line["loss"]) for line in job.lines()]) for job in stages]
    return write_study(study.folder, content, curves, [timing(job) for job in jobs if job.facts()])


def timing(job: Any) -> list[str]:
    """A line of `timings.md`."""
    if isinstance(job, Evaluation):
        return [job.label, "-", f"{job.facts()['seconds'] / 3600:.3f}", "-"]
    pace, memory = pace_of([job]) or 0.0, max((line["max_memory_mib"] or 0 for line in job.lines()), default=0)
    return [job.label, f"{pace:.3f}", f"{pace * job.steps / 3600:.3f}", f"{memory / 1024:.1f}" if memory else "-"]


def pace_of(stages: Sequence[Stage]) -> float | None:
    """Measured seconds a step; None if nothing was measured."""
    seconds = [line["seconds_per_iteration"] for job in stages for line in job.lines()]
    return sum(seconds) / len(seconds) if seconds else None


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
            pace, left, state = pace_of([job]) or pace_of(like), job.steps - step, f"step {step} of {job.steps}"
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
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the quickstart: a waiting thread soon gives its core away
    for number in (signal.SIGTERM, signal.SIGHUP):
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
