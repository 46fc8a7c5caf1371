"""How much of people's captions the descriptions cover, with a language model as judge.

    python eval_scripts/eval_coverage.py RESULTS.json captions_val2014.json --partial --protocol captions \
        --judge-url https://api.openai.com/v1 --judge-model gpt-4-1106-preview --output coverage.json
    python eval_scripts/eval_coverage.py RESULTS.json flickr30k/flickr_annotations_30k.csv --protocol objects \
        --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-14B-Instruct
Protocols: `captions` counts the covered ones of five captions, 0 to 5; `objects` is the share of descriptions that
cover all objects and relations of one caption. The two cannot be compared. Answers are kept: the same command resumes,
and asks nothing twice.
"""

import argparse
import sys

from minigpt4.common.errors import first_few
from minigpt4.common.utils import write_json
from minigpt4.evaluation import command
from minigpt4.evaluation.coverage import PROMPTS, SYSTEM, coverage, score
from minigpt4.evaluation.report import four_digits

RANGES = {"captions": "of 5 captions, mean number covered", "objects": "share of descriptions that cover one caption"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    command.add_result_arguments(parser)
    parser.add_argument("--protocol", choices=RANGES, default="captions", help="which published one (captions)")
    command.add_judge_arguments(parser, required=True)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Scores for the terminal and, if asked for, as JSON."""
    from minigpt4.evaluation.caption_data import match, read_references, read_results

    results = read_results(args.results)
    captions = read_references(args.references, "separate", args.split, results)
    captions = match(results, captions, partial=args.partial)
    answers = coverage(command.judge_of(args), results, captions, args.protocol)
    scored = {
        "results": str(args.results),
        "references": str(args.references),
        **score(answers, args.protocol),
        "empty_descriptions": sum(not text.strip() for text in results.values()),
        "mean_words": sum(len(text.split()) for text in results.values()) / len(results),
        "judge": {"url": args.judge_url, "model": args.judge_model},
        "prompt": {"system": SYSTEM, "user": PROMPTS[args.protocol]},
        "answers": answers,
    }
    shown = four_digits(scored["score"], scored["interval"])
    print(f"coverage, protocol {args.protocol}: {shown}; {RANGES[args.protocol]}")
    print(f"{scored['images']} images, judge {args.judge_model}; {scored['empty_descriptions']} empty texts")
    if fewer := scored["images_with_fewer_captions"]:
        print(f"{fewer} images have fewer than 5 captions; they can cover fewer")
    if unread := scored["unparsable"]:
        named = first_few(unread, 5)
        print(f"{len(unread)} answers of the judge could not be read and are left out: images {named}")
    if args.output:
        write_json(args.output, scored)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return command.main(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
