"""How often answers fail: "describe in detail" and "write a poem" about images, several checkpoints.

The published table, before and after stage 2, on 100 images of a folder:
    python eval_scripts/eval_failure_rate.py --cfg-path eval_configs/minigpt4_failure_eval.yaml \
        --ckpt "before stage 2=weights/minigpt4_stage1_7b.pth" "after stage 2=weights/prerained_minigpt4_7b.pth" \
        --images coco/test2014 --limit 100 --save_path output/failures
On 4 GPUs: torchrun --standalone --nproc-per-node 4 eval_scripts/eval_failure_rate.py ... (the same arguments).
With a judge that sees the images: --judge-url http://localhost:8000/v1 --judge-model NAME
With a person: python eval_scripts/judge_by_hand.py output/failures, then this again with
    --verdicts output/failures/verdicts.jsonl
The same command resumes after a kill, and generates nothing once all answers are there. Rules: docs/failure_rate.md.
"""

import argparse
import logging
import sys
from pathlib import Path

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import exit_status
from minigpt4.evaluation.failure_rules import TASKS, task_called
from minigpt4.evaluation.judge import add_judge_arguments, judge_of

log = logging.getLogger("eval_failure_rate")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [task.name for task in TASKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the evaluation")
    parser.add_argument(
        "--ckpt", required=True, nargs="+", metavar="[NAME=]PATH", help="checkpoints, in the order of the table"
    )
    parser.add_argument(
        "--images", required=True, type=Path, metavar="PATH", help="folder, or JSON list of files or annotations"
    )
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help="where the files of a list are (beside it)")
    parser.add_argument("--save_path", "--save-path", required=True, type=Path, help="folder for all results")
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, help=f"what to ask ({' '.join(names)})")
    parser.add_argument("--limit", type=int, metavar="N", help="draw N images by run.seed (all)")
    parser.add_argument("--verdicts", type=Path, metavar="FILE", help="a person's, in place of rules and judge")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    add_judge_arguments(parser, required=False)
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    return args


def run(args: argparse.Namespace) -> None:
    """Cheap checks first; then ask, find failures and write the report."""
    from minigpt4.common.dist_utils import start_processes, stop_processes
    from minigpt4.evaluation.failure_rate import FailureRun, evaluate, read_verdicts, summary
    from minigpt4.evaluation.generate import read_checkpoint_list, without_datasets
    from minigpt4.inference.image_list import find_images

    config = without_datasets(Config(args).validate(training=False))
    require_paths(config.sections(), config.source)
    if args.verdicts is not None:
        read_verdicts(args.verdicts)
    images = find_images(args.images, args.image_folder, args.limit, config.run.seed)
    judge = judge_of(args)
    checkpoints = read_checkpoint_list(args.ckpt)
    processes = start_processes(config.run.device, config.run.distributed, config.run.dist_url)
    setup_logging(processes.rank)
    log.info("Configuration of %s:\n%s", config.source, config.pretty())
    tasks = [task_called(name) for name in dict.fromkeys(args.tasks)]
    plan = FailureRun(config, checkpoints, images, tasks, args.save_path, judge, args.judge_at_once, args.verdicts)
    results = evaluate(plan, processes)
    if results is not None:
        print(summary(results))
        log.info("Everything is in %s; read failures.md there", args.save_path)
    stop_processes()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error that the user can fix."""
    args = parse_args(argv)
    setup_logging(rank=0)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
