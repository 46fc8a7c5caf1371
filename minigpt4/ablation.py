"""The plan of an ablation, and the jobs that it makes: stages to train and evaluations, equal ones once.

`scripts/ablate.py` does them; the plan's format is in docs/ablations.md.
"""

import argparse
import copy
import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Le, MinLen
from pydantic import BeforeValidator

from minigpt4.common.binding import NonNegativeInt, PositiveFloat, PositiveInt, missing_paths, raise_faults, read
from minigpt4.common.config import Config
from minigpt4.common.config_files import load_yaml, to_plain
from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, hint
from minigpt4.common.utils import JsonLines, read_facts, script_path

DONE, FAILED, LOG = "done.json", "failed.txt", "output.txt"
"""What a job has in its folder."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
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
        lists = {"options": own.options, **{f"stages.{name}": given for name, given in own.stages.items()}}
        for key, pairs in lists.items():
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


@dataclass(eq=False)
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


@dataclass(eq=False)
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
        # One process equals torchrun with one, and no kill leaves it behind.
        several = [*TORCHRUN, "--standalone", f"--nproc-per-node={self.processes}"]
        command = [*(several if self.processes > 1 else [sys.executable]), script_path("train.py")]
        return [[*command, "--cfg-path", self.config.source, "--options", *self.options, *own]]

    def finish(self) -> dict[str, Any]:
        from minigpt4.common.checkpoint import newest_checkpoint, read_card

        checkpoint = newest_checkpoint(self.folder, self.config.run.job_name)
        card = checkpoint and read_card(checkpoint)
        if not card or card["iteration"] < self.steps:
            raise RunError("training stopped before its end; the same command goes on")
        parameters = sum(math.prod(shape) for shape in card["trained"].values())
        return {"checkpoint": str(checkpoint.relative_to(self.folder)), "parameters": parameters}

    def run_folder(self) -> Path:
        """Of its run; one that died before its first checkpoint leaves an older one."""
        found = sorted(self.folder.glob("*/"))
        return self.checkpoint().parent if self.facts() or not found else found[-1]

    def lines(self, name: str = "metrics.jsonl") -> list[Mapping[str, Any]]:
        """Of a log of its run."""
        return JsonLines(self.run_folder() / name).read()

    def pace(self) -> float | None:
        """Measured seconds a step; None if nothing was measured."""
        seconds = [line["seconds_per_iteration"] for line in self.lines()]
        return fmean(seconds) if seconds else None


@dataclass(eq=False)
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
