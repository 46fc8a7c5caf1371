"""How often answers fail: "describe in detail" and "write a poem" about images, several checkpoints.

The published table, before and after stage 2, on 100 images of a folder:
    python eval_scripts/eval_failure_rate.py --cfg-path eval_configs/minigpt4_failure_eval.yaml \
        --ckpt "before stage 2=weights/minigpt4_stage1_7b.pth" "after stage 2=weights/prerained_minigpt4_7b.pth" \
        --images coco/test2014 --limit 100 --save_path output/failures
On 4 GPUs: torchrun --standalone --nproc-per-node 4 eval_scripts/eval_failure_rate.py ... (the same arguments).
With a judge that sees the images: --judge-url http://localhost:8000/v1 --judge-model NAME
The same command resumes after a kill, and generates nothing once all answers are there. Rules: docs/failure_rate.md.
"""

import argparse
import logging
import sys

from minigpt4.common.utils import quick_imports
from minigpt4.evaluation import command
from minigpt4.evaluation.failure_rules import TASKS

log = logging.getLogger("eval_failure_rate")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    command.add_image_arguments(parser, "folder, or JSON list of files or annotations")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to ask (all)")
    command.add_judge_arguments(parser, required=False)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Cheap checks first; then ask, find failures and write the report."""
    config = command.read_config(args)
    with quick_imports():
        from minigpt4.evaluation.failure_rate import evaluate, summary
        from minigpt4.inference.image_list import find_images

    images = find_images(args.images, args.image_folder, args.limit, config.run.seed)
    judge, tasks = command.judge_of(args), list(dict.fromkeys(args.tasks))
    with command.started(args, config) as run:
        results = evaluate(run, images, tasks, judge)
        if results is not None:
            print(summary(results))
            log.info("Everything is in %s; read failures.md there", args.save_path)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return command.main(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
