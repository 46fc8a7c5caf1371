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
from pathlib import Path

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import exit_status
from minigpt4.evaluation.metrics import FAMILIES, require_caption_metrics, usable_families

log = logging.getLogger("eval_flickr30k")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the evaluation")
    parser.add_argument(
        "--ckpt", required=True, nargs="+", metavar="[NAME=]PATH", help="checkpoints, in the order of the table"
    )
    parser.add_argument("--save_path", "--save-path", required=True, type=Path, help="folder for all results")
    parser.add_argument(
        "--reference-mode",
        choices=("joined", "separate"),
        default="joined",
        help="score against the one string that training used, or against each caption of an image (joined)",
    )
    parser.add_argument("--metrics", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="what to compute (all)")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Cheap checks first; then caption, score and write the report."""
    from minigpt4.common.dist_utils import start_processes, stop_processes
    from minigpt4.evaluation.caption_run import CaptionRun, evaluate, for_evaluation
    from minigpt4.evaluation.generate import read_checkpoint_list
    from minigpt4.evaluation.report import require_figures, summary

    config = for_evaluation(Config(args).validate(training=False))
    require_paths(config.sections(), config.source)
    require_caption_metrics("--metrics")
    require_figures("metrics.png")
    families, notes = usable_families(args.metrics)
    checkpoints = read_checkpoint_list(args.ckpt)
    processes = start_processes(config.run.device, config.run.distributed, config.run.dist_url)
    setup_logging(processes.rank)
    log.info("Configuration of %s:\n%s", config.source, config.pretty())
    for note in notes:
        log.info("%s", note)
    plan = CaptionRun(config, checkpoints, args.save_path, args.reference_mode, families, notes)
    results = evaluate(plan, processes)
    if results is not None:
        print(summary(results))
        log.info("Everything is in %s; open report.html there", args.save_path)
    stop_processes()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error that the user can fix."""
    args = parse_args(argv)
    setup_logging(rank=0)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
