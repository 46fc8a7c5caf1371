"""What the commands of evaluations share: their options, what they evaluate, and the way from options to processes.

Imports no torch, so that a wrong option is named at once, and answers are scored without waiting for it.
"""

import argparse
import dataclasses
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import exit_status, quick_imports
from minigpt4.evaluation.judge import Judge, JudgeEndpoint
from minigpt4.evaluation.metrics import FAMILIES

if TYPE_CHECKING:
    from minigpt4.common.dist_utils import Processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint to evaluate."""

    name: str
    """In tables, such as `epoch 3`."""
    path: Path
    sha256: str
    card: dict[str, Any] | None
    """What reports repeat of the card beside the file; None without a card that fits the file."""

    @property
    def identity(self) -> dict[str, str]:
        """Which checkpoint it is, for reports."""
        return {"name": self.name, "file": str(self.path), "sha256": self.sha256}

    @property
    def file_name(self) -> str:
        """The name as part of a file name, `epoch_3`."""
        return file_name(self.name)


class EvaluationRun(NamedTuple):
    """What a command evaluates, the folder of its results, and the processes that do it."""

    cfg: Config
    checkpoints: Sequence[NamedCheckpoint]
    folder: Path
    processes: "Processes"


def file_name(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)


# Options


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the text as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that asks checkpoints; `started` reads them."""
    parser.add_argument("--cfg-path", required=True, help="YAML file of the evaluation")
    ckpt = "checkpoints, in the order of the table (the whole LLaVA that model.llama_model is)"
    parser.add_argument("--ckpt", nargs="+", metavar="[NAME=]PATH", help=ckpt)
    parser.add_argument("--save_path", "--save-path", required=True, type=Path, help="folder for all results")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # of old launchers, beside LOCAL_RANK


def add_prompt_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """The option of a command that asks questions about images."""
    text = "with <ImageHere>, of LLaVA also <image>, and {} for the question, before the model's template"
    parser.add_argument("--prompt", default=default, metavar="TEXT", help=text)


def add_question_arguments(parser: argparse.ArgumentParser, what: str, prompt: str) -> None:
    """The options of a command that asks checkpoints questions from a file."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--questions", required=True, type=Path, metavar="FILE", help=what)
    parser.add_argument("--image-path", required=True, type=Path, metavar="DIR", help="folder of the images")
    add_prompt_argument(parser, prompt)


def add_image_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """The options of a command that asks checkpoints the same about many images."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--images", required=True, type=Path, metavar="PATH", help=what)
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help="where the files of a list are (beside it)")
    parser.add_argument("--limit", type=positive_number, metavar="N", help="draw N images by run.seed (all)")


def positive_number(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_metric_arguments(parser: argparse.ArgumentParser, mode: str) -> None:
    """The options of a command that scores captions; `mode` is the default."""
    text = f"score against the one string that training uses, or against each caption of an image ({mode})"
    parser.add_argument("--reference-mode", choices=("joined", "separate"), default=mode, help=text)
    parser.add_argument("--metrics", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="what to compute (all)")


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that judges captions from a file."""
    parser.add_argument("results", type=Path, help='captions: [{"image_id": ..., "caption": "..."}]')
    parser.add_argument("references", type=Path, help="COCO annotations, our JSON, or the Flickr30k CSV")
    parser.add_argument("--split", default="test", help="split of a Flickr30k CSV (test)")
    parser.add_argument("--partial", action="store_true", help="the images of the results alone")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores there, too")


def add_judge_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options of a command that asks a judge; `judge_of` reads them."""
    group = parser.add_argument_group("judge", "any OpenAI-compatible endpoint, of a service or of this machine")
    group.add_argument("--judge-url", required=required, metavar="URL", help="such as http://localhost:8000/v1")
    group.add_argument("--judge-model", required=required, metavar="NAME", help="model that the endpoint answers with")
    own, cache = JudgeEndpoint, Path("output/judge_answers.jsonl")
    key = "environment variable with the key, if the endpoint wants one (%(default)s)"
    group.add_argument("--judge-key-variable", default=own.key_variable, metavar="NAME", help=key)
    group.add_argument("--judge-cache", type=Path, default=cache, metavar="FILE", help="answers so far")
    seconds = "for one answer (%(default)g)"
    group.add_argument("--judge-timeout", type=float, default=own.timeout, metavar="SECONDS", help=seconds)
    number = "requests at once (%(default)s)"
    group.add_argument("--judge-at-once", type=int, default=own.at_once, metavar="N", help=number)


def judge_of(args: argparse.Namespace, ledger: Path | None = None, **changes: Any) -> Judge | None:
    """The judge of a command line, or None without `--judge-url`; `changes` are fields of `JudgeEndpoint`, before those
    of options. ConfigError for what cannot be."""
    if not args.judge_url:
        return None
    settings = {name: getattr(args, f"judge_{name}") for name in ("key_variable", "timeout", "at_once")}
    endpoint = JudgeEndpoint(args.judge_url, args.judge_model or "", **(settings | changes))
    return Judge(endpoint, args.judge_cache, ledger)


def without_datasets(cfg: Config) -> Config:
    """The config of a command whose images come from an option: no `model.ckpt`, no datasets."""
    return cfg.replace(model=dataclasses.replace(cfg.model, ckpt=None), datasets={})


def for_evaluation(cfg: Config) -> Config:
    """The config without what an evaluation does not read: `model.ckpt` and the training annotations."""
    split = split_of(cfg)
    datasets = {}
    for name, section in cfg.datasets.items():
        info = section.build_info
        own = getattr(info, f"{split}_ann_path", None)
        info = dataclasses.replace(info, ann_path=own) if own and info.image_path else info
        datasets[name] = dataclasses.replace(section, build_info=info)
    return cfg.replace(model=dataclasses.replace(cfg.model, ckpt=None), datasets=datasets)


def split_of(cfg: Config) -> str:
    """The one split of an evaluation; ConfigError for several."""
    splits = cfg.run.test_splits or ["test"]
    if len(splits) != 1:
        raise ConfigError(f"{cfg.source}: run.test_splits: {', '.join(splits)}: an evaluation takes one split")
    return splits[0]


def read_config(args: argparse.Namespace, prepare: Callable[[Config], Config] = without_datasets) -> Config:
    """The config, `prepare`d, whose files are all there; ConfigError if it is wrong."""
    config = prepare(Config(args).validate(training=False))
    require_paths(config.sections(), config.source)
    return config


@contextmanager
def started(args: argparse.Namespace, config: Config) -> Iterator[EvaluationRun]:
    """The `EvaluationRun` of a command: its checkpoints, in the processes that the launcher started."""
    from minigpt4.common.dist_utils import start_processes, stop_processes
    from minigpt4.evaluation.generate import read_checkpoint_list, whole_checkpoint

    processes = start_processes(config.run.device, config.run.distributed, config.run.dist_url)
    setup_logging(processes.rank)
    checkpoints = processes.on_main(lambda: read_checkpoint_list(args.ckpt or whole_checkpoint(config)))
    log.info("Configuration of %s:\n%s", config.source, config.pretty())
    yield EvaluationRun(config, checkpoints, args.save_path, processes)
    stop_processes()


def answer(args: argparse.Namespace, questions: Sequence[Any], image_mark: str = "") -> None:
    """Ask checkpoints, a file of answers each; cheap checks first."""
    config = read_config(args)
    with quick_imports():
        from minigpt4.evaluation.generate import answer_checkpoints, question_files

    question_files(questions, args.image_path)  # are the images there?
    with started(args, config) as run:
        for file in answer_checkpoints(run, questions, args.image_path, args.prompt, image_mark):
            sys.stdout.write(f"{len(questions)} answers are in {file}\n")


def main(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """The exit status of a command: 0, or 2 for an error that the user can fix."""
    setup_logging(rank=0)
    return exit_status(lambda: run(args))
