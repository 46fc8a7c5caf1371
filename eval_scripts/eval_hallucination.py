"""How often captions and answers name objects that are not there.

CHAIR of captions, no model needed:
    python eval_scripts/eval_py chair RESULTS.json instances_val2014.json --partial \
        --captions captions_val2014.json
    python eval_scripts/eval_py chair captions_epoch_4.json data/mini/scenes_test.json
Questions with yes or no, as in POPE: made from the truth, asked, scored:
    python eval_scripts/eval_py pope-questions instances_val2014.json --negatives adversarial \
        --output questions.jsonl
    python eval_scripts/eval_py pope --cfg-path eval_configs/minigpt4_failure_eval.yaml --ckpt CKPT.pth \
        --questions questions.jsonl --image-path coco/val2014 --save_path output/pope \
        --options run.generation.max_new_tokens=20
    python eval_scripts/eval_py pope-score output/pope/answers_CKPT.jsonl questions.jsonl
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import start_processes, stop_processes
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import exit_status, write_json
from minigpt4.evaluation.caption_data import first_few, match, read_references, read_results
from minigpt4.evaluation.generate import read_checkpoint_list, without_datasets
from minigpt4.evaluation.hallucination import (
    NEGATIVES,
    PROMPT,
    PopeRun,
    chair_scores,
    compare,
    evaluate_pope,
    make_questions,
    pope_scores,
    pope_table,
    question_files,
    read_answers,
    read_questions,
    read_truth,
    write_lines,
    wrong_captions,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _chair_arguments(commands.add_parser("chair", help="objects in captions that the images do not show"))
    _questions_arguments(commands.add_parser("pope-questions", help="make questions about objects from the truth"))
    _pope_arguments(commands.add_parser("pope", help="ask checkpoints such questions and score their answers"))
    _score_arguments(commands.add_parser("pope-score", help="score answers to such questions"))
    return parser.parse_args(argv)


def _chair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help='captions: [{"image_id": ..., "caption": "..."}]')
    _truth_arguments(parser)
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="captions by people, whose objects count as there, too"
    )
    parser.add_argument("--split", default="test", help="split of --captions, if that is a Flickr30k CSV (test)")
    parser.add_argument("--partial", action="store_true", help="the images of the results alone")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write scores and wrong captions there, too")
    parser.set_defaults(run=run_chair)


def _truth_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("truth", type=Path, help='{"image id": ["object", ...]}, COCO instances, or scenes_test.json')
    parser.add_argument(
        "--synonyms", type=Path, metavar="FILE", help="a line an object: name, synonym, ... (the shipped list for COCO)"
    )


def _questions_arguments(parser: argparse.ArgumentParser) -> None:
    _truth_arguments(parser)
    parser.add_argument(
        "--negatives",
        choices=NEGATIVES,
        default="random",
        help="which objects that are not there (random)",
    )
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="questions of each kind an image (3)")
    parser.add_argument("--least-objects", type=int, default=1, metavar="N", help="leave images with fewer out (1)")
    parser.add_argument("--images", type=int, metavar="N", help="draw so many images (all)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (0)")
    parser.add_argument("--suffix", default=".jpg", help="of image files that the truth does not name (.jpg)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="the questions")
    parser.set_defaults(run=run_questions)


def _pope_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg-path", required=True, help="YAML file of the evaluation")
    parser.add_argument(
        "--ckpt", required=True, nargs="+", metavar="[NAME=]PATH", help="checkpoints, in the order of the table"
    )
    parser.add_argument("--questions", required=True, type=Path, metavar="FILE.jsonl", help="a question a line")
    parser.add_argument("--image-path", required=True, type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--save_path", "--save-path", required=True, type=Path, help="folder for all results")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="with <ImageHere> and {} for the question, before the model's template"
    )
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    parser.set_defaults(run=run_pope)


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("answers", type=Path, help='{"question_id": 1, "answer": "Yes."} a line')
    parser.add_argument("questions", type=Path, help='{"question_id": 1, "image", "text", "label"} a line')
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores there, too")
    parser.set_defaults(run=run_score)


def run_chair(args: argparse.Namespace) -> None:
    """CHAIR of a file of captions."""
    results, truth = read_results(args.results), read_truth(args.truth, args.synonyms)
    truth = truth.only(match(results, truth.objects, partial=args.partial))
    if args.captions:
        truth = truth.with_captions(read_references(args.captions, "separate", args.split))
    images = compare(results, truth)
    found = chair_scores(images)
    counts = found["counts"]
    print(_table(found))
    print(f"{counts['captions']} captions, {counts['captions_wrong']} with an object that is not there")
    print(f"{counts['mentions']} mentions of objects, {counts['mentions_wrong']} of them wrong")
    sources = {"results": str(args.results), "truth": str(args.truth), "captions": args.captions and str(args.captions)}
    if args.output:
        write_json(args.output, {**sources, **found, "wrong": wrong_captions(images, results)})


def run_questions(args: argparse.Namespace) -> None:
    """A file of questions."""
    truth = read_truth(args.truth, args.synonyms)
    questions = make_questions(
        truth,
        args.negatives,
        pairs=args.pairs,
        least_objects=args.least_objects,
        images=args.images,
        seed=args.seed,
        suffix=args.suffix,
    )
    write_lines(args.output, map(asdict, questions))
    images = len({question.image for question in questions})
    print(f"{len(questions)} questions about {images} images ({args.negatives}) are in {args.output}")


def run_pope(args: argparse.Namespace) -> None:
    """Answers and scores of checkpoints; cheap checks first."""
    config = without_datasets(Config(args).validate(training=False))
    require_paths(config.sections(), config.source)
    questions = read_questions(args.questions)
    question_files(questions, args.image_path)  # are the images there?
    checkpoints = read_checkpoint_list(args.ckpt)
    processes = start_processes(config.run.device, config.run.distributed, config.run.dist_url)
    setup_logging(processes.rank)
    prompt = args.prompt or PROMPT
    plan = PopeRun(config, checkpoints, questions, args.image_path, args.save_path, prompt)
    results = evaluate_pope(plan, processes)
    if results is not None:
        print(pope_table(results).markdown())
        for row in results["checkpoints"]:
            print(f"{row['name']}: {pope_summary(row)}")
    stop_processes()


def run_score(args: argparse.Namespace) -> None:
    """Scores of a file of answers."""
    found = pope_scores(read_questions(args.questions), read_answers(args.answers))
    print(_table(found))
    print(pope_summary(found))
    if args.output:
        write_json(args.output, {"answers": str(args.answers), "questions_file": str(args.questions), **found})


def pope_summary(found: dict[str, Any]) -> str:
    """How many questions, and which answers are neither yes nor no."""
    unread = found["unparsable"]
    named = f": questions {first_few(unread, 5)}" if unread else ""
    return f"{found['questions']} questions, {len(unread)} answers are neither yes nor no{named}"


def _table(found: dict[str, Any]) -> str:
    """A line a score, with its interval."""
    lines = []
    for name, value in found["scores"].items():
        ends = found["intervals"].get(name)
        text = "-" if value is None else f"{value:.4f}"
        lines.append(f"{name:15} {text:>9}" + (f"   95% {ends[0]:.4f} - {ends[1]:.4f}" if ends else ""))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    setup_logging(rank=0)
    return exit_status(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
