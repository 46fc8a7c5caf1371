"""ScienceQA: make questions, ask checkpoints, score their answers, and join them with GPT-4's.

    python eval_scripts/eval_science_qa.py convert data/scienceqa --split test --prompt-format CQM-A \
        --output data/scienceqa/llava_test_CQM-A.json
    python eval_scripts/eval_science_qa.py answer --cfg-path eval_configs/llava_bench_eval.yaml \
        --questions data/scienceqa/llava_test_CQM-A.json --image-path data/scienceqa/images/test \
        --save_path output/scienceqa --single-pred-prompt
    python eval_scripts/eval_science_qa.py score data/scienceqa output/scienceqa/answers_llava-v1.5-7b.jsonl \
        --save_path output/scienceqa
    python eval_scripts/eval_science_qa.py gpt4 data/scienceqa output/scienceqa/answers_llava-v1.5-7b.jsonl \
        --gpt4-result gpt4_result.json --requery requery.jsonl --save_path output/scienceqa
The folder holds problems.json and pid_splits.json. Records of the split train, in QCM-LEA, are what LLaVA is tuned on.
"""

import argparse
import sys
from pathlib import Path

from minigpt4.common.utils import write_json, write_lines, write_whole
from minigpt4.conversation.llava import IMAGE_TOKEN
from minigpt4.evaluation import command, science_qa
from minigpt4.evaluation.questions import PROMPT, read_answer_lines


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="problems as records of LLaVA")
    answer = commands.add_parser("answer", help="ask checkpoints")
    score = commands.add_parser("score", help="accuracy, as a whole and by subject")
    gpt4 = commands.add_parser("gpt4", help="answers joined with GPT-4's")
    for own in (convert, score, gpt4):
        own.add_argument("folder", type=Path, help="with problems.json and pid_splits.json")
        own.add_argument("--split", default="test", help="of pid_splits.json (test)")
    convert.add_argument("--prompt-format", default="QCM-LEA", metavar="IN-OUT", help="as published (QCM-LEA)")
    forms = ".json: conversations; .jsonl: instruction, output"
    convert.add_argument("--output", required=True, type=Path, metavar="FILE", help=forms)
    convert.set_defaults(run=run_convert)
    command.add_question_arguments(answer, "records of `convert`", PROMPT)
    answer.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter alone, as LLaVA 1.5")
    answer.set_defaults(run=run_answer)
    score.add_argument("answers", nargs="+", type=Path, help="files of answers, a row of the table each")
    score.set_defaults(run=run_score)
    gpt4.add_argument("answers", type=Path, help="file of answers that end in `The answer is B.`")
    gpt4.add_argument("--gpt4-result", required=True, type=Path, metavar="FILE.json", help='{"outputs": {id: text}}')
    final = "GPT-4's final answers; with --judge-url, written there"
    gpt4.add_argument("--requery", type=Path, metavar="FILE.jsonl", help=final)
    gpt4.add_argument("--seed", type=int, default=0, help="of the choices where an answer has none (0)")
    command.add_judge_arguments(gpt4, required=False)
    gpt4.set_defaults(run=run_gpt4)
    for own in (score, gpt4):
        own.add_argument("--save_path", "--save-path", type=Path, metavar="DIR", help="write results there, too")
    return parser.parse_args(argv)


def run_convert(args: argparse.Namespace) -> None:
    """The records of a split."""
    problems = science_qa.read_problems(args.folder, args.split)
    as_lines = args.output.suffix == ".jsonl"
    records = science_qa.records(problems, args.prompt_format, as_lines=as_lines)
    if as_lines:
        write_lines(args.output, records)
    else:
        write_json(args.output, records)
    print(f"{len(records)} records ({args.split}, {args.prompt_format}) are in {args.output}")


def run_answer(args: argparse.Namespace) -> None:
    """A file of answers a checkpoint."""
    questions = science_qa.read_questions(args.questions, letter_alone=args.single_pred_prompt)
    command.answer(args, questions, f"{IMAGE_TOKEN}\n")


def run_score(args: argparse.Namespace) -> None:
    """Each file's accuracy for the terminal and, if asked for, the published files."""
    problems, outcomes = science_qa.read_problems(args.folder, args.split), []
    for path in args.answers:
        answers = read_answer_lines(path)
        outcomes.append(science_qa.score(path.stem, problems, answers))
        print(science_qa.missing_note(path.stem, problems, answers))
    _show(args, problems, outcomes)


def run_gpt4(args: argparse.Namespace) -> None:
    """Both ensembles, beside our answers alone."""
    problems, answers = science_qa.read_problems(args.folder, args.split), read_answer_lines(args.answers)
    ours, gpt4 = {key: line["text"] for key, line in answers.items()}, science_qa.read_outputs(args.gpt4_result)
    outcomes = [science_qa.score(args.answers.stem, problems, answers)]
    for name, own in ((args.answers.stem, ours), ("GPT-4", gpt4)):
        print(science_qa.missing_note(name, problems, own))
    outcomes.append(science_qa.complement(problems, ours, gpt4, args.seed))
    judge = command.judge_of(args)
    if judge:
        final = science_qa.requery(judge, problems, ours, gpt4)
        if args.requery:
            write_lines(args.requery, [{"question_id": key, "text": text} for key, text in final.items()], "--requery")
    elif args.requery:
        final = {key: line["text"] for key, line in read_answer_lines(args.requery).items()}
    if judge or args.requery:
        outcomes.append(science_qa.judged(problems, ours, gpt4, final, args.seed))
    _show(args, problems, outcomes)


def _show(args: argparse.Namespace, problems: science_qa.Problems, outcomes: list[science_qa.Outcome]) -> None:
    for own in outcomes:
        print("\n".join([f"{own.name}:", *own.lines]))
    table = science_qa.table(problems, outcomes).markdown()
    print(f"\n{table}")
    if args.save_path is None:
        return
    for own in outcomes:
        stem = own.name.strip("+ ").replace(" ", "_")
        write_json(args.save_path / f"{stem}_output.json", own.analysis, "--save_path")
        write_json(args.save_path / f"{stem}_result.json", own.result(problems), "--save_path")
        groups = science_qa.by_group(problems, own.results)
        shares = {name: science_qa.percent(*pair) for name, pair in groups.items()}
        write_json(args.save_path / f"{stem}_subjects.json", shares, "--save_path")
    write_whole(args.save_path / "science_qa.md", table)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return command.main(args.run, args)


if __name__ == "__main__":
    sys.exit(main())
