"""Score captions in COCO's results form against references; no model is needed.

    python eval_scripts/score_captions.py RESULTS.json captions_val2014.json --partial
    python eval_scripts/score_captions.py captions_epoch_4.json flickr30k/flickr_annotations_30k.csv --split test
    python eval_scripts/score_captions.py captions_epoch_4.json flickr30k/flickr30k_grounded_detail_test.json \
        --reference-mode joined --output scores.json
References: COCO annotations, files of prepare_flickr30k.py, or the Flickr30k CSV.
"""

import argparse
import sys
from pathlib import Path

from minigpt4.common.utils import exit_status, write_json
from minigpt4.evaluation.bootstrap import intervals_of
from minigpt4.evaluation.caption_data import match, read_references, read_results
from minigpt4.evaluation.metrics import FAMILIES, CaptionScorer, require_caption_metrics, usable_families
from minigpt4.evaluation.report import score_table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help='captions: [{"image_id": ..., "caption": "..."}]')
    parser.add_argument("references", type=Path, help="COCO annotations, our JSON, or the Flickr30k CSV")
    parser.add_argument(
        "--reference-mode",
        choices=("separate", "joined"),
        default="separate",
        help="each caption of an image is a reference, or all of them joined into one (separate)",
    )
    parser.add_argument("--split", default="test", help="split of a Flickr30k CSV (test)")
    parser.add_argument("--partial", action="store_true", help="score the images of the results alone")
    parser.add_argument("--metrics", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="what to compute (all)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores there, too")
    return parser.parse_args(argv)


def score(args: argparse.Namespace) -> dict:
    """Everything that is known about the captions, plain types."""
    require_caption_metrics("--metrics")
    families, notes = usable_families(args.metrics)
    results = read_results(args.results)
    references = match(results, read_references(args.references, args.reference_mode, args.split), partial=args.partial)
    scorer = CaptionScorer(references, families)
    scores = scorer.score(results)
    return {
        "results": str(args.results),
        "references": str(args.references),
        "reference_mode": args.reference_mode,
        "images": len(results),
        "empty_captions": sum(not caption.strip() for caption in results.values()),
        "scores": scores.corpus,
        "intervals": intervals_of(scores, len(results)),
        "notes": notes,
    }


def show(scored: dict) -> str:
    """Table, intervals and notes for the terminal."""
    name = Path(scored["results"]).stem
    rows = {name: scored["scores"]}
    for side, place in (("low", 0), ("high", 1)):
        if scored["intervals"]:
            rows[f"95% {side}"] = {metric: ends[place] for metric, ends in scored["intervals"].items()}
    head = (
        f"{scored['images']} images, references {scored['reference_mode']}, {scored['empty_captions']} empty captions"
    )
    return "\n".join([head, "", score_table(rows, list(scored["scores"])).markdown(), *scored["notes"]])


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Scores for the terminal and, if asked for, as JSON."""
    scored = score(args)
    print(show(scored))
    if args.output:
        write_json(args.output, scored)


if __name__ == "__main__":
    sys.exit(main())
