"""Train and evaluate all rows of an ablation, and write its table.

    python scripts/ablate.py train_configs/ablations/mini.yaml --output output/ablations --dry-run
    python scripts/ablate.py train_configs/ablations/mini.yaml --output output/ablations --seeds 0 1 2 --jobs 2
Stages that rows share are trained once. The same command goes on after a kill, and retries what failed.
On a cluster, as array jobs: --commands prints a line for each row and seed. The plan's format: docs/ablations.md.
"""

import argparse
import copy
import hashlib
import json
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
from minigpt4.common.run_folder import FILE, NO_LOCKS, locked
from minigpt4.common.utils import JsonLines, exit_status, read_facts, write_json, write_whole

ROOT = Path(__file__).resolve().parents[1]
DONE, FAILED, LOG = "done.json", "failed.txt", "output.txt"
PLACE = re.compile(r"(?<!\$)\{([a-z_][a-z0-9_]*)\}")
OWN_KEYS = ("run.seed", "run.output_dir", "run.resume_ckpt_path")
UNHASHED = ("seed", "output_dir", "resume_ckpt_path", "job_name", "wandb_log", "tensorboard_log")
"""Keys of `run:` that say nothing about what is trained, or are said apart."""
SMOOTHED = 5
"""Lines of the log that a point of a curve is the mean of."""
LAUNCHER_LINE = re.compile(r"[EW]\d{4} .*torch/distributed|\s*$")

Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


# The plan


@dataclass
class Column:
    """A column of the table: a number in a JSON file that an evaluation writes."""

    file: str
    """`EVALUATION/FILE.json`."""
    key: str
    """Keys and numbers on the way to it, with dots between: `checkpoints.0.scores.CIDEr`; `*`: the only one there."""
    interval: str | None = None
    """The same for its 95% interval, a list of two."""
    scale: PositiveFloat = 1.0
    """100 makes shares percentages."""
    digits: Annotated[NonNegativeInt, Le(9)] = 2


@dataclass
class Row:
    """A row of the table; the first is the default."""

    options: list[str] = field(default_factory=list)
    """`KEY=VALUE`, as for train.py, of all stages; those of `model.` also where an evaluation says `{options}`."""
    stages: dict[str, list[str]] = field(default_factory=dict)
    """The same of single stages."""
    base: dict[str, str] = field(default_factory=dict)
    """Other recipes of stages."""
    without: list[str] = field(default_factory=list)
    """Stages that are left out."""
    values: dict[str, str] = field(default_factory=dict)
    """Other `values`."""
    published: dict[str, float] = field(default_factory=dict)
    """Published numbers, by column."""


@dataclass
class Plan:
    """What is compared. Options and commands may hold `{NAME}` of `values`, and `{row}`."""

    base: Annotated[dict[str, str], MinLen(1)]
    """Recipe of each stage, in order; each starts from the last checkpoint of the one before."""
    rows: Annotated[dict[str, Any], MinLen(1)]
    """By name; see Row."""
    seeds: Annotated[list[NonNegativeInt], MinLen(1)]
    evaluate: dict[str, Texts]
    """Commands by name, also with `{checkpoint}`, `{seed}`, `{output}` (a folder), `{options}`."""
    columns: dict[str, Any]
    """By name; see Column."""
    options: list[str] = field(default_factory=list)
    stages: dict[str, list[str]] = field(default_factory=dict)
    """Options of all rows, as in a row."""
    values: dict[str, str] = field(default_factory=dict)
    processes: PositiveInt = 1
    """Processes of a training run, one for each GPU."""


def read_plan(path: Path) -> Plan:
    """The plan in a file; ConfigError with all its faults."""
    values = to_plain(load_yaml(path), str(path))
    plan, faults = read(Plan, values, "plan")
    faults = [fault.removeprefix("plan.") for fault in faults]
    for name, schema in (("rows", Row), ("columns", Column)):
        sections = getattr(plan, name) if plan else {}
        for key, own in sections.items():
            sections[key], found = read(schema, own or {}, f"{name}.{key}")
            faults += found
    raise_faults(str(path), faults or list(_contradictions(plan)))
    return plan


def _contradictions(plan: Plan) -> Iterator[str]:
    places = [("", plan), *((f"rows.{name}.", row) for name, row in plan.rows.items())]
    names = [
        *((f"{place}stages", own.stages, plan.base) for place, own in places),
        *(
            (f"rows.{name}.{key}", getattr(row, key), plan.base)
            for name, row in plan.rows.items()
            for key in ("base", "without")
        ),
        *((f"rows.{name}.values", row.values, plan.values) for name, row in plan.rows.items()),
        *((f"rows.{name}.published", row.published, plan.columns) for name, row in plan.rows.items()),
        *(
            (f"columns.{name}.file", [column.file.partition("/")[0]], plan.evaluate)
            for name, column in plan.columns.items()
        ),
    ]
    for key, used, known in names:
        yield from (f"{key}: unknown name {name!r}; {hint(name, known)}" for name in used if name not in known)
    for place, own in places:
        options = [("options", own.options), *((f"stages.{name}", given) for name, given in own.stages.items())]
        for key, given in options:
            for pair in given:
                if pair.partition("=")[0] in OWN_KEYS:
                    yield f"{place}{key}: {pair.partition('=')[0]} is set for each run by this command; leave it out"
    for name, row in plan.rows.items():
        if set(row.without) >= set(plan.base):
            yield f"rows.{name}.without: no stage is left"


def fill(text: str, values: Mapping[str, str], where: str) -> str:
    """`text` with the `values` in the place of their `{NAME}`; ConfigError for an unknown one."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise ConfigError(f"{where}: {found[0]} is unknown; {hint(found[1], values)}")
        return values[found[1]]

    return PLACE.sub(value, text)


# What there is to do


@dataclass
class Job:
    """A stage to train or an evaluation, in a folder that its content names."""

    name: str
    seed: int
    before: "Stage | None"
    root: Path
    rows: list[str] = field(default_factory=list, kw_only=True)

    @property
    def folder(self) -> Path:
        """Where it works; the same job of another row has the same."""
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
        """The facts of a job whose commands ended well; RunError if it is not done all the same."""
        return {}


@dataclass
class Stage(Job):
    """A training run: a recipe with options and seed, from the checkpoint of the stage before."""

    config: Config
    options: list[str]
    processes: int

    def hash_of(self, seed: int | None) -> str:
        """A hash of what is trained, the stages before included; without `seed` that of a row."""
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
        epoch = self.config.run.max_epoch - 1
        return self.folder / self.facts().get("checkpoint", f"JOB_ID/checkpoint_{epoch}.pth")

    def commands(self) -> list[list[str]]:
        script = ROOT / "train.py"
        own = [f"run.seed={self.seed}", f"run.output_dir={self.folder}", "run.resume_ckpt_path=auto"]
        own += [f"model.ckpt={self.before.checkpoint()}"] if self.before else []
        script = "train.py" if Path.cwd() == ROOT else str(script)
        command = [script, "--cfg-path", self.config.source, "--options", *self.options, *own]
        if self.processes == 1:  # which equals torchrun with one process, and a kill leaves nothing behind
            return [[sys.executable, *command]]
        return [[*torchrun(), "--standalone", f"--nproc-per-node={self.processes}", *command]]

    def finish(self) -> dict[str, Any]:
        from minigpt4.common.checkpoint import newest_checkpoint, read_card

        checkpoint = newest_checkpoint(self.folder, self.config.run.job_name)
        card = checkpoint and read_card(checkpoint)
        if not card or card["iteration"] < self.steps:
            raise RunError("training stopped before its end; the same command goes on")
        sizes = {name: _product(shape) for name, shape in card["trained"].items()}
        return {"checkpoint": str(checkpoint.relative_to(self.folder)), "parameters": sum(sizes.values())}

    def lines(self, name: str = "metrics.jsonl") -> list[Mapping[str, Any]]:
        """Of a log of its run."""
        return [line for file in sorted(self.folder.glob(f"*/{name}")) for line in JsonLines(file).read()]


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run"]


@dataclass
class Evaluation(Job):
    """Commands, one after the other, that ask a checkpoint."""

    templates: list[str]
    values: dict[str, str]
    options: list[str]
    where: str

    @cached_property
    def key(self) -> str:
        text = json.dumps([self._filled(self.before.key, "OUTPUT"), self.before.key])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def commands(self) -> list[list[str]]:
        programs = {"python": [sys.executable], "torchrun": torchrun()}
        commands = self._filled(str(self.before.checkpoint()), str(self.folder))
        return [[*programs.get(first, [first]), *words] for first, *words in commands]

    def _filled(self, checkpoint: str, output: str) -> list[list[str]]:
        values = self.values | {"checkpoint": checkpoint, "output": output, "seed": str(self.seed), "options": ""}
        return [
            [
                filled
                for word in shlex.split(template)
                for filled in (self.options if word == "{options}" else [fill(word, values, self.where)])
            ]
            for template in self.templates
        ]

    def missing(self) -> Iterator[str]:
        """Scripts and configurations that its commands name and are not there."""
        for command in self._filled("CHECKPOINT", "OUTPUT"):
            for word in command:
                if word.endswith((".py", ".yaml")) and not word.startswith("OUTPUT") and not Path(word).exists():
                    yield f"{self.where}: {word} does not exist"


@dataclass
class Study:
    """A plan with its seeds, and where its results are."""

    path: Path
    plan: Plan
    seeds: list[int]
    output: Path
    missing: list[str] = field(default_factory=list)
    """What the plan names and is not there."""

    @property
    def folder(self) -> Path:
        """Of the table."""
        return self.output / self.path.stem

    @cached_property
    def cells(self) -> dict[tuple[str, int], list[Job]]:
        """Stages and then evaluations of each row and seed; equal jobs are one object."""
        jobs: dict[Path, Job] = {}

        def one(job: Job, row: str) -> Job:
            job = jobs.setdefault(job.folder, job)
            job.rows += [row] if row not in job.rows else []
            return job

        found = {}
        for name, row in self.plan.rows.items():
            values = {**self.plan.values, **row.values, "row": name}
            stages = [self._stage(name, row, stage, values) for stage in self.plan.base if stage not in row.without]
            asked = [self._filled(pair, values, name) for pair in (*self.plan.options, *row.options)]
            asked = [pair for pair in asked if pair.startswith("model.")]
            for seed in self.seeds:
                before, cell = None, []
                for stage, config, options in stages:
                    place = self.output / "runs"
                    before = one(Stage(stage, seed, before, place, config, options, self.plan.processes), name)
                    cell.append(before)
                for evaluation, commands in self.plan.evaluate.items():
                    where, place = f"{self.path}: evaluate.{evaluation}", self.output / "evaluations"
                    job = Evaluation(evaluation, seed, before, place, commands, values, asked, where)
                    self.missing += job.missing()
                    cell.append(one(job, name))
                found[name, seed] = cell
        self.missing = list(dict.fromkeys(self.missing))
        return found

    def _filled(self, pair: str, values: Mapping[str, str], row: str) -> str:
        return fill(pair, values, f"{self.path}: rows.{row}: {pair}")

    def _stage(self, name: str, row: Row, stage: str, values: Mapping[str, str]) -> tuple[str, Config, list[str]]:
        plan, where = self.plan, f"{self.path}: rows.{name}, {stage}"
        given = [*plan.options, *plan.stages.get(stage, []), *row.options, *row.stages.get(stage, [])]
        options = [self._filled(pair, values, name) for pair in given]
        recipe = row.base.get(stage, plan.base[stage])
        try:
            args = argparse.Namespace(cfg_path=fill(recipe, values, where), options=options)
            config = Config(args).validate()
        except MiniGPT4Error as error:
            raise ConfigError(f"{where}: {error}") from error
        is_first = stage == next(other for other in plan.base if other not in row.without)
        missing = [(key, path) for key, path in missing_paths(config.sections()) if is_first or key != "model.ckpt"]
        self.missing += [f"{where}: {recipe}: {key}: {path} does not exist" for key, path in missing]
        return stage, config, options

    def jobs(self, rows: Sequence[str]) -> list[Job]:
        """Those of some rows, once, stages before what they are for, seed by seed."""
        found = [job for seed in self.seeds for row in rows for job in self.cells[row, seed]]
        return list({job.folder: job for job in found}.values())


# Doing it


@dataclass
class Running:
    """A job at work: its commands, one after the other."""

    job: Job
    lock: int
    slot: int
    commands: list[list[str]]
    environment: dict[str, str]
    started: float = field(default_factory=time.monotonic)
    process: subprocess.Popen | None = None

    def next(self) -> None:
        """Start the next command; what it says goes to the job's log."""
        command = self.commands.pop(0)
        with (self.job.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            # The lock is the command's, too: should it outlive this process, another one waits for it.
            self.process = subprocess.Popen(command, **streams, env=self.environment, pass_fds=[self.lock])


def take(folder: Path) -> int | None:
    """The lock of a job's folder, None if another process works there."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / FILE
    lock.touch()
    try:
        own = locked(lock)
        for other in folder.glob(f"*/{FILE}") if own is not None else ():  # processes of a torchrun that was killed
            theirs = locked(other)
            if theirs is None:
                os.close(own)
                return None
            os.close(theirs)
        return own
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RunError(f"{lock}: cannot be locked: {error.strerror}") from error
        return os.open(os.devnull, os.O_RDONLY)


class Queue:
    """Runs jobs, several at once, each when the one before it is done; with `gpus` each slot has its own."""

    def __init__(self, jobs: Sequence[Job], slots: int, gpus: Sequence[Sequence[str]], study: Study) -> None:
        self.waiting, self.running = list(jobs), []
        self.slots, self.gpus, self.study = slots, gpus, study
        self.failed: set[Path] = set()
        self.told: set[Path] = set()

    def run(self) -> None:
        """Until nothing is left that can be done; what fails is noted in its folder."""
        try:
            while self.waiting or self.running:
                self._start()
                self._look()
                time.sleep(0.05)
        except KeyboardInterrupt:
            for one in self.running:
                one.process.terminate()  # training saves and stops
            for one in self.running:
                one.process.wait()
            raise

    def _start(self) -> None:
        for job in list(self.waiting):
            if job.facts():
                self.waiting.remove(job)
            elif job.before and job.before.folder in self.failed:
                self.waiting.remove(job)
                self.failed.add(job.folder)
            elif len(self.running) < self.slots and (job.before is None or job.before.facts()):
                with errors_as(RunError, f"--output: {job.folder} cannot be used"):
                    lock = take(job.folder)
                if lock is None:
                    if job.folder not in self.told:
                        say(f"{job.label}: another process works on it; waiting")
                    self.told.add(job.folder)
                elif job.facts():  # it has just done it
                    os.close(lock)
                else:
                    self.waiting.remove(job)
                    self._begin(job, lock)

    def _begin(self, job: Job, lock: int) -> None:
        say(f"{job.label}: {job.folder}")
        (job.folder / FAILED).unlink(missing_ok=True)
        slot = next(number for number in range(self.slots) if number not in {one.slot for one in self.running})
        environment = os.environ | {"WANDB_RUN_GROUP": self.study.path.stem, "WANDB_JOB_TYPE": job.rows[0]}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[slot])
        running = Running(job, lock, slot, job.commands(), environment)
        running.next()
        self.running.append(running)

    def _look(self) -> None:
        for one in list(self.running):
            status = one.process.poll()
            if status is None:
                continue
            if status == 0 and one.commands:
                one.next()
                continue
            self.running.remove(one)
            seconds = time.monotonic() - one.started
            try:
                if status:
                    raise RunError(f"exit status {status}: {last_words(one.job.folder / LOG)}")
                facts = one.job.finish()
                write_json(one.job.folder / DONE, facts | {"seconds": round(seconds, 1)})
                say(f"{one.job.label}: done in {seconds:.0f} s")
            except MiniGPT4Error as error:
                self.failed.add(one.job.folder)
                write_whole(one.job.folder / FAILED, f"{error}\n", "--output")
                say(f"{one.job.label}: failed, {error}; all that it said is in {one.job.folder / LOG}")
            os.close(one.lock)


def last_words(log: Path) -> str:
    """The last error that a log names, else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    own = [line for line in lines if not LAUNCHER_LINE.match(line)]
    own = own[max((number for number, line in enumerate(own) if line.startswith("$ ")), default=0) + 1 :]
    errors = [line for line in own if line.startswith("error: ")]
    return (errors or own or ["it said nothing"])[-1].strip()[:300]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# What came out


def lookup(content: Any, key: str) -> Any:
    """The value at the end of a way of keys; LookupError with the part that is not there."""
    for part in key.split("."):
        if part == "*" and isinstance(content, dict | list) and len(content) == 1:
            content = next(iter(content.values())) if isinstance(content, dict) else content[0]
        elif isinstance(content, list) and part.lstrip("-").isdigit() and -len(content) <= int(part) < len(content):
            content = content[int(part)]
        elif isinstance(content, dict) and part in content:
            content = content[part]
        else:
            raise LookupError(part)
    return content


def read_column(study: Study, name: str, cell: Sequence[Job]) -> tuple[float | None, list[float] | None]:
    """A number and its interval, None where there is none; ConfigError if the evaluation is done without this key."""
    column = study.plan.columns[name]
    evaluation, _, file = column.file.partition("/")
    job = next(job for job in cell if isinstance(job, Evaluation) and job.name == evaluation)
    if not job.facts():
        return None, None
    content, found = read_facts(job.folder / file), []
    for key in (column.key, column.interval):
        try:
            found.append(lookup(content, key) if key else None)
        except LookupError as error:
            path = job.folder / file
            raise ConfigError(f"{study.path}: columns.{name}: {key}: no {error.args[0]!r} in {path}") from error
    value, ends = found
    if value is None or value != value:  # NaN: nothing of the kind was asked
        return None, None
    return value * column.scale, [end * column.scale for end in ends] if ends else None


def describe(study: Study, name: str) -> dict[str, Any]:
    """A row of `table.json`."""
    row, cells = study.plan.rows[name], [study.cells[name, seed] for seed in study.seeds]
    values = {column: [read_column(study, column, cell) for cell in cells] for column in study.plan.columns}
    failures = [
        f"seed {seed}: {job.name} failed, {job.failure()} (log: {(job.folder / LOG).relative_to(study.output)})"
        for seed, cell in zip(study.seeds, cells, strict=True)
        for job in cell
        if job.failure() and not job.facts()
    ]
    done = sum(all(job.facts() for job in cell) for cell in cells)
    state = "failed" if failures else "" if done == len(cells) else f"{done} of {len(cells)} done"
    stages = {}
    for job in [job for cell in cells for job in cell if isinstance(job, Stage)]:
        run = job.config.run
        batch = job.config.batch_size() * job.processes
        own = stages.setdefault(job.name, {"steps": job.steps, "batch": batch, "losses": [], "hashes": []})
        epochs = [line["train_loss"] for line in job.lines("log.txt") if "train_loss" in line]
        own["losses"].append(float(epochs[-1]) if job.facts() and len(epochs) >= run.max_epoch else None)
        own["hashes"].append(job.key)
    last = [[job for job in cell if isinstance(job, Stage)][-1] for cell in cells]
    changes = [*(f"`{pair}`" for pair in row.options), *(f"without {stage}" for stage in row.without)]
    changes += [f"{stage} is `{recipe}`" for stage, recipe in row.base.items()]
    changes += [f"{stage}: {', '.join(f'`{pair}`' for pair in own)}" for stage, own in row.stages.items()]
    changes += [f"{key} = `{value}`" for key, value in row.values.items()]
    known = next((job for job in last if job.facts()), None)
    return {
        "name": name,
        "change": "; ".join(changes) or "the recipes as they are",
        "published": row.published,
        "values": {column: [value for value, _ in pairs] for column, pairs in values.items()},
        "intervals": {column: [ends for _, ends in pairs] for column, pairs in values.items()},
        "parameters": known and known.facts().get("parameters"),
        "tokens": known and tokens_of(known.config),
        "stages": stages,
        "configuration": last[0].hash_of(None),
        "state": state,
        "failures": failures,
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
    git = [read_facts(file).get("git") for job in stages for file in sorted(job.folder.glob("*/run.json"))]
    commits = {f"{own['commit']}{', changed' if own['changed'] else ''}" for own in git if own}
    columns = {name: {"digits": column.digits} for name, column in study.plan.columns.items()}
    curves: dict[str, dict[str, list[Any]]] = {}
    for (row, _), cell in study.cells.items():
        for job in cell:
            if isinstance(job, Stage) and (lines := [line for line in job.lines() if line.get("loss") is not None]):
                losses = [line["loss"] for line in lines]
                windows = [losses[max(0, end - SMOOTHED) : end] for end in range(1, len(losses) + 1)]
                curve = [line["step"] for line in lines], [sum(window) / len(window) for window in windows]
                curves.setdefault(job.name, {}).setdefault(row, []).append(curve)
    content = {
        "plan": study.path.stem,
        "seeds": study.seeds,
        "columns": columns,
        "commits": sorted(commits),
        "rows": [describe(study, name) for name in study.plan.rows],
    }
    return write_study(study.folder, content, curves, [timing(job) for job in jobs if job.facts()])


def timing(job: Job) -> list[str]:
    """A line of `timings.md`."""
    if not isinstance(job, Stage):
        return [job.label, "-", f"{job.facts()['seconds'] / 3600:.3f}", "-"]
    pace = pace_of([job]) or 0.0
    memory = max((line.get("max_memory_mib") or 0 for line in job.lines()), default=0)
    return [job.label, f"{pace:.3f}", f"{pace * job.steps / 3600:.3f}", f"{memory / 1024:.1f}" if memory else "-"]


def pace_of(stages: Sequence[Stage]) -> float | None:
    """Measured seconds a step; None if nothing was measured."""
    seconds = [line["seconds_per_iteration"] for job in stages for line in job.lines()]
    return sum(seconds) / len(seconds) if seconds else None


# The command


def show(study: Study, rows: Sequence[str]) -> None:
    """What there is, what is to do, with its commands, and how long that may take."""
    jobs, total, unknown = study.jobs(rows), 0.0, 0
    for job in jobs:
        state, seconds = "done", 0.0
        if not job.facts():
            like = [other for other in jobs if other.name == job.name]
            if isinstance(job, Stage):
                step = max((line["step"] + 1 for line in job.lines()), default=0)
                pace = pace_of([job]) or pace_of(like)
                seconds = None if pace is None else pace * (job.steps - step)
                state = f"step {step} of {job.steps}"
            else:
                measured = [other.facts()["seconds"] for other in like if other.facts()]
                seconds = sum(measured) / len(measured) if measured else None
                state = "to do"
            if job.failure():
                state = f"failed at {state}: {job.failure()}"
            state += "" if seconds is None else f", about {seconds / 60:.1f} min"
        unknown += seconds is None
        total += seconds or 0.0
        print(f"{job.label}: {state}")
        for command in job.commands() if state != "done" else ():
            print(f"    {shlex.join(command)}")
    print(f"To do: about {total / 60:.0f} min one after the other", end="")
    print(f", and {unknown} jobs of which none was measured yet" if unknown else "")


def gpu_slots(jobs: int, processes: int) -> list[list[str]]:
    """The GPUs of each slot; none where there is one slot, which may have all, or no GPU. ConfigError for too few."""
    if jobs == 1:
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if names and jobs * processes > len(names):
        raise ConfigError(f"--jobs: {jobs} jobs of {processes} processes need as many GPUs; there are {len(names)}")
    return [names[slot * processes : (slot + 1) * processes] for slot in range(jobs)] if names else []


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file of rows, seeds, evaluations and columns")
    parser.add_argument("--output", type=Path, default=Path("output/ablations"), help="folder (output/ablations)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="in the place of the plan's")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="train and evaluate these rows alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="at once, each with a GPU of its own (1)")
    parser.add_argument("--dry-run", action="store_true", help="show what is done, all commands, and the time left")
    parser.add_argument("--commands", action="store_true", help="print a command for each row and seed, and stop")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.seeds and min(args.seeds) < 0:
        parser.error("--seeds must be at least 0")
    return args


def run(args: argparse.Namespace) -> bool:
    """Whether all that was to be done is done."""
    plan = read_plan(args.plan)
    study = Study(args.plan, plan, list(dict.fromkeys(args.seeds or plan.seeds)), args.output)
    rows = list(dict.fromkeys(args.only or plan.rows))
    for row in rows:
        if row not in plan.rows:
            raise ConfigError(f"{args.plan}: --only {row}: unknown row; {hint(row, plan.rows)}")
    if args.commands:
        for row, seed in ((row, seed) for row in rows for seed in study.seeds):
            own = ["python", "scripts/ablate.py", str(args.plan), "--output", str(args.output)]
            print(shlex.join([*own, "--only", row, "--seeds", str(seed)]))
        return True
    jobs = study.jobs(rows)
    if args.dry_run:
        show(study, rows)
        print("".join(f"missing: {fault}\n" for fault in study.missing), end="")
        return True
    if study.missing:
        raise ConfigError("\n  - ".join([f"{args.plan}: not found from {Path.cwd()}", *study.missing]))
    queue = Queue(jobs, args.jobs, gpu_slots(args.jobs, plan.processes), study)
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
    return status if status or all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
