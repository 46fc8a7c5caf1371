"""Memes, recipes, advertisements, poems: answer, have the answers judged by a model or by people, and report.

    python eval_scripts/eval_advanced.py answer --cfg-path eval_configs/minigpt4_failure_eval.yaml \
        --ckpt "stage 1=weights/minigpt4_stage1_7b.pth" "stage 2=weights/prerained_minigpt4_7b.pth" \
        --images tasks --save_path output/advanced
    python eval_scripts/eval_advanced.py judge output/advanced --judge-url http://localhost:8000/v1 --judge-model NAME
    python eval_scripts/eval_advanced.py page output/advanced       # for people; their verdicts go into the folder
    python eval_scripts/eval_advanced.py report output/advanced --join output/failures/failures.json coverage.json
`tasks` has the folders meme, recipe, advertisement, poem, or others with a question.txt. Models of other configurations
answer into the same folder, one command each. The same command resumes, and asks nothing twice; docs/evaluation.md.
"""

import argparse
import sys
from pathlib import Path

from minigpt4.common.utils import write_json
from minigpt4.evaluation import advanced, command
from minigpt4.evaluation.questions import PROMPT


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    answer = commands.add_parser("answer", help="ask checkpoints")
    command.add_image_arguments(answer, "folder with a folder a task, or JSON list; --limit is of each task")
    command.add_prompt_argument(answer, PROMPT)
    answer.set_defaults(run=run_answer)
    judge = commands.add_parser("judge", help="have a model judge the answers, and answers of known quality")
    page = commands.add_parser("page", help="write a page on which a person judges the answers")
    report = commands.add_parser("report", help="table and page of all verdicts")
    for own, run in ((judge, run_judge), (page, run_page), (report, run_report)):
        own.add_argument("folder", type=Path, help="with the files of answers")
        own.set_defaults(run=run)
    judge.add_argument("--shuffled", action="store_true", help="also the same answers beside other images")
    command.add_judge_arguments(judge, required=True)
    for own in (judge, page):
        own.add_argument("--seed", type=int, default=0, help="of the order (0)")
    joined = "results: failures.json, coverage, CHAIR"
    report.add_argument("--join", nargs="+", default=[], type=Path, metavar="FILE", help=joined)
    return parser.parse_args(argv)


def run_answer(args: argparse.Namespace) -> None:
    """A file of answers a checkpoint; cheap checks first."""
    config = command.read_config(args)
    given = (args.images, args.image_folder, config.run.advanced_tasks, args.limit, config.run.seed)
    base, questions = advanced.read_tasks(*given)
    with command.started(args, config) as run:
        for file in advanced.answer(run, questions, base, args.prompt):
            print(f"{len(questions)} answers are in {file}")


def run_judge(args: argparse.Namespace) -> None:
    """A file of verdicts."""
    judge, sets = command.judge_of(args), advanced.read_answers(args.folder)
    answers = [one for own in sets for one in own.answers]
    chosen = [*answers, *(one for kind in advanced.control().values() for one in kind)]
    if args.shuffled:
        chosen += [one for own in sets for one in advanced.shuffled(own.answers)]
    verdicts = advanced.ask_judge(judge, chosen, args.seed)
    one = judge.endpoint
    about = {"judge": one.model, "kind": "model", "url": one.address, "temperature": one.temperature}
    about |= {"prompt_sha256": advanced.prompt_hash(answers), "seed": args.seed}
    file = args.folder / f"verdicts_{command.file_name(one.model)}.json"
    write_json(file, about | {"verdicts": verdicts})
    none = sum(own is None for own in verdicts.values())
    print(f"{len(verdicts) - none} verdicts are in {file}; {none} replies were none, twice")


def run_page(args: argparse.Namespace) -> None:
    """A page that needs no server."""
    from minigpt4.evaluation.advanced_report import write_blind_page

    file = write_blind_page(args.folder, advanced.read_answers(args.folder), args.seed)
    print(f"Open {file} in a browser; what it saves, verdicts_<name>.json, belongs into {args.folder}")


def run_report(args: argparse.Namespace) -> None:
    """The report, and its text for the terminal."""
    from minigpt4.evaluation.advanced_report import joined_tables, write_report

    joined = joined_tables(args.join)
    sets, judges = advanced.read_answers(args.folder), advanced.read_verdicts(args.folder)
    print(write_report(args.folder, sets, judges, joined))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return command.main(args.run, args)


if __name__ == "__main__":
    sys.exit(main())
