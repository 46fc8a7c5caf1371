"""Caption the test images with several checkpoints and score the captions.

One checkpoint, then all of a run on 4 GPUs:
    python eval_scripts/eval_flickr30k.py --cfg-path eval_configs/minigpt4_flickr_eval.yaml \
        --ckpt weights/prerained_minigpt4_7b.pth --save_path output/flickr_eval
    torchrun --standalone --nproc-per-node 4 eval_scripts/eval_flickr30k.py \
        --cfg-path eval_configs/minigpt4_flickr_eval.yaml \
        --ckpt pretrained=weights/prerained_minigpt4_7b.pth RUN/checkpoint_0.pth RUN/checkpoint_1.pth \
        --save_path output/flickr_eval
The frozen parts load once. The same command again goes on after a kill, and generates nothing when all is there.
"""

import argparse
import logging
import sys
from pathlib import Path

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import exit_status
from minigpt4.evaluation.metrics import FAMILIES

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
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="values that go over the file's")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> None:
    """Check what can be wrong, the cheap first, then caption, score and write the report."""
    from minigpt4.common.dist_utils import start_processes, stop_processes
    from minigpt4.evaluation import caption_run, generate, metrics, report
    from minigpt4.evaluation.report import summary

    config = Config(args)
    config = caption_run.for_evaluation(config.validate(training=False))
    require_paths(config.sections(), config.source)
    metrics.require_caption_metrics("--metrics")
    report.require_figures("metrics.png")
    families, notes = metrics.usable_families(args.metrics)
    checkpoints = generate.read_checkpoint_list(args.ckpt)
    run = config.run
    processes = start_processes(run.device, run.distributed, run.dist_url)
    setup_logging(processes.rank)
    log.info("Configuration of %s:\n%s", config.source, config.pretty())
    for note in notes:
        log.info("%s", note)
    plan = caption_run.CaptionRun(config, checkpoints, args.save_path, args.reference_mode, families, notes)
    facts = caption_run.evaluate(plan, processes)
    if facts is not None:
        print(summary(facts))
        log.info("Everything is in %s; open report.html there", args.save_path)
    stop_processes()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error that the user can mend."""
    args = parse_args(argv)
    setup_logging(rank=0)
    return exit_status(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
