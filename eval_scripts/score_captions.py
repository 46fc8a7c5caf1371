"""Score captions in COCO's results form against references; no model is needed.

    python eval_scripts/score_captions.py RESULTS.json captions_val2014.json --partial
    python eval_scripts/score_captions.py captions_epoch_4.json flickr30k/flickr_annotations_30k.csv --split test
    python eval_scripts/score_captions.py captions_epoch_4.json flickr30k/flickr30k_grounded_detail_test.json \
        --reference-mode joined --output scores.json
References: COCO annotations, files of prepare_flickr30k.py, or the Flickr30k CSV.
"""

import argparse
import sys
from typing import Any

from minigpt4.common.utils import write_json
from minigpt4.evaluation import command
from minigpt4.evaluation.bootstrap import Bootstrap
from minigpt4.evaluation.metrics import CaptionScorer, require_caption_metrics
from minigpt4.evaluation.report import Table, score_table, with_intervals


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    command.add_result_arguments(parser)
    command.add_metric_arguments(parser, "separate")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Scores for the terminal and, if asked for, as JSON."""
    from minigpt4.evaluation.caption_data import match, read_references, read_results

    require_caption_metrics("--metrics")
    results = read_results(args.results)
    references = read_references(args.references, args.reference_mode, args.split, results)
    references = match(results, references, partial=args.partial)
    scores = CaptionScorer(references, args.metrics).score(results)
    scored: dict[str, Any] = {
        "results": str(args.results),
        "references": str(args.references),
        "reference_mode": args.reference_mode,
        "images": len(results),
        "empty_captions": sum(not caption.strip() for caption in results.values()),
        "scores": scores.corpus,
        "intervals": Bootstrap([scores], len(results)).intervals(0) if len(results) > 1 else {},
    }
    table = score_table({args.results.stem: scores.corpus}, list(scores.corpus))
    if scored["intervals"]:
        ends = [[f"{end:.4f}" for end in one] for one in scored["intervals"].values()]
        table = Table(table.head, with_intervals(args.results.stem, table.rows[0][1:], ends))
    print(f"{len(results)} images, references {args.reference_mode}, {scored['empty_captions']} empty captions\n")
    print(table.markdown())
    if args.output:
        write_json(args.output, scored)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return command.main(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
