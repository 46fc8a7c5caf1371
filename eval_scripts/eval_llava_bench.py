"""LLaVA-Bench (COCO, In-the-Wild): answer, have the answers judged beside a reference, and sum up.

    python eval_scripts/eval_llava_bench.py answer --cfg-path eval_configs/llava_bench_eval.yaml \
        --questions questions.jsonl --image-path images --save_path output/llava_bench
    python eval_scripts/eval_llava_bench.py answer --cfg-path eval_configs/minigpt4_failure_eval.yaml --ckpt CKPT.pth \
        --questions questions.jsonl --image-path images --save_path output/llava_bench \
        --options run.generation.max_new_tokens=1024
    python eval_scripts/eval_llava_bench.py judge --questions questions.jsonl --context context.jsonl \
        --rule rule.json --reference answers_gpt4.jsonl --answers output/llava_bench/answers_CKPT.jsonl \
        --output output/llava_bench/reviews/CKPT.jsonl --judge-url https://api.openai.com/v1 --judge-model gpt-4-0314
    python eval_scripts/eval_llava_bench.py summary output/llava_bench/reviews
COCO: qa90_questions.jsonl, caps_boxes_coco2014_val_80.jsonl, qa90_gpt4_answer.jsonl. Files are the published ones, so
each step can also take those of others. The same command resumes, and asks nothing twice.
"""

import argparse
import sys
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import quick_imports, write_json
from minigpt4.evaluation import command

with quick_imports():
    from minigpt4.evaluation import llava_bench
    from minigpt4.evaluation.questions import PROMPT, read_questions

FILES = {
    "questions": "a question a line",
    "context": "what the judge knows, a line an image",
    "rule": "JSON: what it is told to do",
    "reference": "answers of the teacher",
    "answers": "answers to be judged",
    "output": "the review, JSON lines",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    answer = commands.add_parser("answer", help="ask checkpoints")
    judge = commands.add_parser("judge", help="have answers scored beside the reference")
    summary = commands.add_parser("summary", help="relative scores of reviews")
    command.add_question_arguments(answer, "a question a line", PROMPT)
    answer.set_defaults(run=run_answer)
    for name, what in FILES.items():
        judge.add_argument(f"--{name}", required=True, type=Path, metavar="FILE", help=what)
    command.add_judge_arguments(judge, required=True)
    judge.set_defaults(run=run_judge)
    summary.add_argument("reviews", nargs="+", type=Path, help="files of reviews, or folders of them")
    summary.add_argument("--ignore", nargs="+", default=[], metavar="ID", help="questions to leave out")
    summary.add_argument("--select", nargs="+", default=[], metavar="TEXT", help="files whose names hold all of these")
    summary.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores there, too")
    summary.set_defaults(run=run_summary)
    return parser.parse_args(argv)


def run_answer(args: argparse.Namespace) -> None:
    """A file of answers a checkpoint."""
    command.answer(args, read_questions(args.questions, llava_bench.BenchQuestion))


def run_judge(args: argparse.Namespace) -> None:
    """The review of one file of answers, and its summary."""
    files = (args.questions, args.context, args.rule, args.reference, args.answers)
    comparisons = llava_bench.read_comparisons(*files)
    llava_bench.review(command.judge_of(args, temperature=llava_bench.TEMPERATURE), comparisons, args.output)
    _show([llava_bench.summarise(args.output)])


def run_summary(args: argparse.Namespace) -> None:
    """Relative scores for the terminal and, if asked for, as JSON."""
    files: list[Path] = []
    for path in args.reviews:
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    chosen = [file for file in sorted(files) if all(text in llava_bench.review_name(file) for text in args.select)]
    if not chosen:
        raise ConfigError(f"{args.reviews[0]}: there are no reviews, files that end in .jsonl (see --select)")
    found = [llava_bench.summarise(file, args.ignore) for file in chosen]
    _show(found)
    if args.output:
        write_json(args.output, {own.name: own.facts() for own in found})


def _show(found: list[llava_bench.Summary]) -> None:
    print("\n".join(line for own in found for line in own.lines()))
    print(f"\n{llava_bench.table(found).markdown()}")
    print("\n".join(own.note() for own in found))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return command.main(args.run, args)


if __name__ == "__main__":
    sys.exit(main())
