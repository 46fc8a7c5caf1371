"""Benchmarks of visual question answering: ask checkpoints and score their answers, or score answers from files.

    python eval_scripts/eval_vqa.py answer gqa --cfg-path eval_configs/minigpt4_vqa_eval.yaml \
        --ckpt "stage 2=weights/prerained_minigpt4_7b.pth" --questions gqa/testdev_balanced_questions.json \
        --image-path gqa/images --save_path output/vqa
    python eval_scripts/eval_vqa.py answer aokvqa --cfg-path eval_configs/llava_bench_eval.yaml \
        --questions aokvqa/aokvqa_v1p0_val.json --image-path coco --save_path output/vqa
    python eval_scripts/eval_vqa.py score vqav2 results.json --questions v2_OpenEnded_mscoco_val2014_questions.json \
        --annotations v2_mscoco_val2014_annotations.json --save_path output/vqa
vqa.md in the folder is the table of all benchmarks that were evaluated there. docs/evaluation.md lists their files.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from minigpt4.common.binding import bind
from minigpt4.common.config import Config
from minigpt4.common.config_files import load_yaml
from minigpt4.common.errors import ConfigError, SampleError, first_few, hint, require_same_ids
from minigpt4.common.schemas import VqaPrompts
from minigpt4.common.torch_files import file_sha256
from minigpt4.common.utils import quick_imports
from minigpt4.evaluation import command
from minigpt4.evaluation.questions import QUESTION_PLACE
from minigpt4.evaluation.vqa import BENCHMARKS, Rank, ask_checkpoints
from minigpt4.evaluation.vqa_data import Files, QuestionSet, read_questions
from minigpt4.evaluation.vqa_report import Rules, write_report
from minigpt4.evaluation.vqa_scores import SCORERS

PROMPTS = Path(__file__).parents[1] / "eval_configs" / "vqa_prompts.yaml"
OF = {"annotations": ("vqav2", "okvqa"), "choices": ("gqa",), "vectors": ("aokvqa_direct",)}
"""Which benchmarks have a file."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    answer = commands.add_parser("answer", help="ask checkpoints, and score what they say")
    score = commands.add_parser("score", help="score answers from files")
    for own in (answer, score):
        own.add_argument("benchmark", choices=BENCHMARKS, help=", ".join(BENCHMARKS), metavar="BENCHMARK")
    command.add_checkpoint_arguments(answer)
    answer.add_argument("--image-path", required=True, type=Path, metavar="DIR", help="folder of the images")
    answer.add_argument("--prompt", metavar="NAME|TEXT", help="of --prompts, or a text with <ImageHere> and {}")
    answer.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help=f"({PROMPTS.name})")
    ranks = "of the losses of a choice's tokens (sum)"
    answer.add_argument("--rank", choices=get_args(Rank), default="sum", help=ranks)
    answer.set_defaults(run=run_answer, partial=False)
    score.add_argument("results", nargs="+", metavar="[NAME=]FILE", help="as the benchmark wants them, a row each")
    score.add_argument("--save_path", "--save-path", required=True, type=Path, help="folder for all results")
    score.add_argument("--partial", action="store_true", help="questions may lack an answer; the table says so")
    score.set_defaults(run=run_score, rank="sum", image_path=None)
    for own in (answer, score):
        own.add_argument("--questions", required=True, type=Path, metavar="FILE", help="as published")
        own.add_argument("--annotations", type=Path, metavar="FILE", help="answers of VQAv2 or OK-VQA")
        own.add_argument("--choices", type=Path, metavar="FILE", help="GQA's, for validity and plausibility")
        own.add_argument("--vectors", type=Path, metavar="FILE", help="GloVe's, for A-OKVQA's nearest choice")
        own.add_argument("--split", default="test", help="of ScienceQA (test)")
        own.add_argument("--scorer", choices=SCORERS, default="official", help="whose rules count (official)")
        own.add_argument("--answer", choices=("whole", "first-line"), default="whole", help="what is scored (whole)")
    return parser.parse_args(argv)


def run_answer(args: argparse.Namespace) -> None:
    """Ask, score, report; cheap checks first."""
    config = command.read_config(args)
    name, prompt = _prompt(args, config)
    files, read = _read(args)
    with quick_imports():
        from minigpt4.evaluation.generate import question_files

    question_files(read.questions, args.image_path)  # are the images there?
    benchmark = BENCHMARKS[args.benchmark]
    with command.started(args, config) as run:
        setup, said = ask_checkpoints(benchmark, run, read, args.image_path, prompt)
        if said is not None:
            rows = list(zip(run.checkpoints, said, strict=True))
            _report(args, files, read, rows, {"prompt_name": name, **setup})


def run_score(args: argparse.Namespace) -> None:
    """Score the answers of files."""
    files, read = _read(args)
    benchmark, rows = BENCHMARKS[args.benchmark], []
    if lacking := sum(benchmark.gold not in one.record for one in read.questions):
        needs = "--annotations" if args.benchmark in ("vqav2", "okvqa") else "a split that has answers"
        raise ConfigError(f"{args.questions}: {lacking} questions have no {benchmark.gold!r}; scoring needs {needs}")
    for value in args.results:
        name, mark, path = value.rpartition("=")
        said = benchmark.form.read(Path(path))
        way_out = "" if args.partial else "; with --partial questions may lack an answer"
        counted = {one.question_id: one.record.get("isBalanced", True) for one in read.questions}
        needed = [key for key, counts in counted.items() if counts]  # GQA's others are for its consistency alone
        given = [key for key in said if counted.get(key, True)]
        require_same_ids(needed, given, f"{path}: ", partial=args.partial, way_out=way_out)
        if args.benchmark == "aokvqa" and not args.partial:  # as its own evaluator refuses them
            none = [one.question_id for one in read.questions if said[one.question_id] not in one.record["choices"]]
            if none:
                raise SampleError(f"{path}: {len(none)} predictions are none of the choices: {first_few(none, 5)}")
        one = command.NamedCheckpoint(name if mark else Path(path).stem, Path(path), file_sha256(Path(path)), None)
        if any(one.file_name == other.file_name for other, _ in rows):
            raise ConfigError(f"{path}: another file is called {one.name!r}, too; name it: NAME={path}")
        rows.append((one, {"file": said}))
    _report(args, files, read, rows, {})


def _read(args: argparse.Namespace) -> tuple[Files, QuestionSet]:
    given = (args.questions, args.annotations, args.choices, args.image_path, args.vectors, args.split)
    for option, own in OF.items():
        if getattr(args, option) and args.benchmark not in own:
            raise ConfigError(f"--{option}: {args.benchmark} has no such file; it is of {' and '.join(own)}")
    files = Files(*given)
    return files, read_questions(BENCHMARKS[args.benchmark].read, files)


def _prompt(args: argparse.Namespace, config: Config) -> tuple[str, str]:
    """Name and text of the prompt."""
    section = load_yaml(args.prompts).get("vqa_prompts", {})
    prompts = bind(VqaPrompts, section, section="vqa_prompts", source=str(args.prompts))
    if args.prompt is None and args.benchmark not in prompts.benchmarks:
        raise ConfigError(f"{args.prompts}: vqa_prompts.benchmarks has no {args.benchmark}; add it, or give --prompt")
    if args.prompt is None:
        return prompts.of(args.benchmark, config.model.model_type, config.model.arch)
    if args.prompt not in prompts.texts and QUESTION_PLACE not in args.prompt:
        known = hint(args.prompt, prompts.texts)
        raise ConfigError(f"--prompt: {args.prompt!r} is none of the texts of {args.prompts}, nor holds {{}}; {known}")
    return (args.prompt, prompts.texts[args.prompt]) if args.prompt in prompts.texts else ("", args.prompt)


def _report(args: argparse.Namespace, files: Files, read: QuestionSet, rows: list, setup: dict) -> None:
    rules = Rules(args.scorer, args.rank, args.partial, args.answer == "first-line")
    results = write_report(args.benchmark, files, read, rows, rules, setup, args.save_path)
    for one in results["checkpoints"]:
        said = f"{100 * one['accuracy']:.2f}% ({results['scorer']})" if "accuracy" in one else "the file has no answers"
        print(f"{one['name']}: {said}, {results['questions']} questions; answers in {args.save_path / one['answers']}")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return command.main(args.run, args)


if __name__ == "__main__":
    sys.exit(main())
