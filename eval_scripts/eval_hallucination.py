"""How often captions and answers name objects that are not there.

CHAIR of captions, no model needed:
    python eval_scripts/eval_hallucination.py chair RESULTS.json instances_val2014.json --partial \
        --captions captions_val2014.json
    python eval_scripts/eval_hallucination.py chair captions_epoch_4.json data/mini/scenes_test.json
Questions with yes or no, as in POPE: made from the truth, asked, scored:
    python eval_scripts/eval_hallucination.py pope-questions instances_val2014.json --negatives adversarial \
        --output questions.jsonl
    python eval_scripts/eval_hallucination.py pope --cfg-path eval_configs/minigpt4_failure_eval.yaml --ckpt CKPT.pth \
        --questions questions.jsonl --image-path coco/val2014 --save_path output/pope \
        --options run.generation.max_new_tokens=20
    python eval_scripts/eval_hallucination.py pope-score output/pope/answers_CKPT.jsonl questions.jsonl
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minigpt4.common.errors import first_few
from minigpt4.common.utils import quick_imports, write_json, write_lines
from minigpt4.evaluation import command, hallucination
from minigpt4.evaluation.questions import read_answer_lines
from minigpt4.evaluation.report import score_table

POPE_METRICS = ("accuracy", "precision", "recall", "F1", "yes share")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    chair = commands.add_parser("chair", help="objects in captions that the images do not show")
    make = commands.add_parser("pope-questions", help="make questions about objects from the truth")
    pope = commands.add_parser("pope", help="ask checkpoints such questions and score their answers")
    score = commands.add_parser("pope-score", help="score answers to such questions")
    chair.add_argument("results", type=Path, help='captions: [{"image_id": ..., "caption": "..."}]')
    for own in (chair, make):
        own.add_argument("truth", type=Path, help='{"image id": ["object", ...]}, COCO instances, or scenes_test.json')
        own.add_argument("--synonyms", type=Path, metavar="FILE", help="a line an object: name, synonym, ... (shipped)")
    chair.add_argument("--captions", type=Path, metavar="FILE", help="by people, whose objects count as there, too")
    chair.add_argument("--split", default="test", help="split of --captions, if that is a Flickr30k CSV (test)")
    chair.add_argument("--partial", action="store_true", help="the images of the results alone")
    chair.add_argument("--output", type=Path, metavar="FILE.json", help="write scores and wrong captions there, too")
    chair.set_defaults(run=run_chair)
    absent = hallucination.NEGATIVES
    make.add_argument("--negatives", choices=absent, default="random", help="which absent objects (random)")
    make.add_argument("--pairs", type=int, default=3, metavar="N", help="questions of each kind an image (3)")
    make.add_argument("--least-objects", type=int, default=1, metavar="N", help="leave images with fewer out (1)")
    make.add_argument("--images", type=int, metavar="N", help="draw so many images (all)")
    make.add_argument("--seed", type=int, default=0, help="of all draws (0)")
    make.add_argument("--suffix", default=".jpg", help="of image files that the truth does not name (.jpg)")
    make.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="the questions")
    make.set_defaults(run=run_questions)
    command.add_question_arguments(pope, "a question a line", hallucination.PROMPT)
    pope.set_defaults(run=run_pope)
    score.add_argument("answers", type=Path, help='{"question_id": 1, "answer": "Yes."} a line')
    score.add_argument("questions", type=Path, help='{"question_id": 1, "image", "text", "label"} a line')
    score.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores there, too")
    score.set_defaults(run=run_score)
    return parser.parse_args(argv)


def run_chair(args: argparse.Namespace) -> None:
    """CHAIR of a file of captions."""
    from minigpt4.evaluation.caption_data import match, read_references, read_results

    results, truth = read_results(args.results), hallucination.read_truth(args.truth, args.synonyms)
    truth = truth.called(results)
    truth = truth.only(match(results, truth.objects, partial=args.partial))
    if args.captions:
        truth = truth.with_captions(read_references(args.captions, "separate", args.split, results))
    found = hallucination.chair(results, truth)
    counts = found["counts"]
    print(_table(found))
    print(f"{counts['captions']} captions, {counts['captions_wrong']} with an object that is not there")
    print(f"{counts['mentions']} mentions of objects, {counts['mentions_wrong']} of them wrong")
    sources = {"results": str(args.results), "truth": str(args.truth), "captions": args.captions and str(args.captions)}
    if args.output:
        write_json(args.output, {**sources, **found})


def run_questions(args: argparse.Namespace) -> None:
    """A file of questions."""
    chosen = {name: getattr(args, name) for name in ("pairs", "least_objects", "images", "seed", "suffix")}
    truth = hallucination.read_truth(args.truth, args.synonyms)
    questions = hallucination.make_questions(truth, args.negatives, **chosen)
    write_lines(args.output, map(asdict, questions))
    images = len({question.image for question in questions})
    print(f"{len(questions)} questions about {images} images ({args.negatives}) are in {args.output}")


def run_pope(args: argparse.Namespace) -> None:
    """Answers and scores of checkpoints; cheap checks first."""
    config = command.read_config(args)
    questions = hallucination.read_object_questions(args.questions)
    with quick_imports():
        from minigpt4.evaluation.generate import question_files

    question_files(questions, args.image_path)  # are the images there?
    with command.started(args, config) as run:
        results = hallucination.evaluate_pope(run, questions, args.image_path, args.prompt)
        if results is not None:
            rows = {row["name"]: row["scores"] for row in results["checkpoints"]}
            print(score_table(rows, POPE_METRICS).markdown())
            for row in results["checkpoints"]:
                print(f"{row['name']}: {_summary(row)}")


def run_score(args: argparse.Namespace) -> None:
    """Scores of a file of answers."""
    answers = {key: line["text"] for key, line in read_answer_lines(args.answers).items()}
    found = hallucination.pope_scores(hallucination.read_object_questions(args.questions), answers)
    print(_table(found))
    print(_summary(found))
    if args.output:
        write_json(args.output, {"answers": str(args.answers), "questions_file": str(args.questions), **found})


def _summary(found: dict[str, Any]) -> str:
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
    return command.main(args.run, args)


if __name__ == "__main__":
    sys.exit(main())
