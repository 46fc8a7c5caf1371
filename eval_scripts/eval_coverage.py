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
from dataclasses import asdict
from pathlib import Path

from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import exit_status, write_json
from minigpt4.evaluation.caption_data import first_few, match, read_references, read_results
from minigpt4.evaluation.coverage import SYSTEM, coverage, prompt_of, score
from minigpt4.evaluation.judge import add_judge_arguments, judge_of

RANGES = {"captions": "of 5 captions, mean number covered", "objects": "share of descriptions that cover one caption"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help='descriptions: [{"image_id": ..., "caption": "..."}]')
    parser.add_argument("references", type=Path, help="COCO annotations, our JSON, or the Flickr30k CSV")
    parser.add_argument("--protocol", choices=RANGES, default="captions", help="which published one (captions)")
    parser.add_argument("--split", default="test", help="split of a Flickr30k CSV (test)")
    parser.add_argument("--partial", action="store_true", help="judge the images of the results alone")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write scores and answers there, too")
    add_judge_arguments(parser, required=True)
    return parser.parse_args(argv)


def judge(args: argparse.Namespace) -> dict:
    """Scores and what they were made from, plain types."""
    results = read_results(args.results)
    captions = match(results, read_references(args.references, "separate", args.split), partial=args.partial)
    judged = coverage(judge_of(args), results, captions, args.protocol, args.judge_at_once)
    return {
        "results": str(args.results),
        "references": str(args.references),
        **score(judged, args.protocol),
        "empty_descriptions": sum(not text.strip() for text in results.values()),
        "judge": {"url": args.judge_url, "model": args.judge_model},
        "prompt": {"system": SYSTEM, "user": prompt_of(args.protocol)},
        "answers": [asdict(one) for one in judged],
    }


def show(scored: dict) -> str:
    """The score and what to know of it."""
    name, value, interval = scored["protocol"], scored["score"], scored["interval"]
    ends = f" (95% {interval[0]:.4f} - {interval[1]:.4f})" if interval else ""
    lines = [
        f"coverage, protocol {name}: {'-' if value is None else f'{value:.4f}'}{ends}; {RANGES[name]}",
        f"{scored['images']} images, judge {scored['judge']['model']}; {scored['empty_descriptions']} empty texts",
    ]
    if scored["images_with_fewer_captions"]:
        lines.append(f"{scored['images_with_fewer_captions']} images have fewer than 5 captions; they can cover fewer")
    if unread := scored["unparsable"]:
        shown = first_few(unread, 5)
        lines.append(f"{len(unread)} answers of the judge could not be read and are left out: images {shown}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    setup_logging(rank=0)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Scores for the terminal and, if asked for, as JSON."""
    scored = judge(args)
    print(show(scored))
    if args.output:
        write_json(args.output, scored)


if __name__ == "__main__":
    sys.exit(main())
