"""Caption the test images with several checkpoints and score the captions.

One checkpoint, then all of a run on 4 GPUs:
    python eval_scripts/eval_flickr30k.py --cfg-path eval_configs/minigpt4_flickr_eval.yaml \
        --ckpt weights/prerained_minigpt4_7b.pth --save_path output/flickr_eval
    torchrun --standalone --nproc-per-node 4 eval_scripts/eval_flickr30k.py \
        --cfg-path eval_configs/minigpt4_flickr_eval.yaml \
        --ckpt pretrained=weights/prerained_minigpt4_7b.pth RUN/checkpoint_0.pth RUN/checkpoint_1.pth \
        --save_path output/flickr_eval
The frozen parts load once. The same command resumes after a kill, and generates nothing once all captions are there.
"""

import argparse
import logging
import sys

from minigpt4.common.utils import quick_imports, require_packages
from minigpt4.evaluation import command
from minigpt4.evaluation.metrics import require_caption_metrics

log = logging.getLogger("eval_flickr30k")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    command.add_checkpoint_arguments(parser)
    command.add_metric_arguments(parser, "joined")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Cheap checks first; then caption, score and write the report."""
    config = command.read_config(args, command.for_evaluation)
    require_caption_metrics("--metrics")
    require_packages("metrics.png", "eval", "matplotlib")
    with quick_imports():
        from minigpt4.evaluation.caption_run import evaluate
        from minigpt4.evaluation.report import headline, scores_of

    with command.started(args, config) as run:
        results = evaluate(run, args.reference_mode, args.metrics)
        if results is not None:
            print(headline(results), scores_of(results).markdown(), sep="\n\n")
            log.info("Everything is in %s; open report.html there", args.save_path)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return command.main(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
