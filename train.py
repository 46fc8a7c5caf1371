"""Train MiniGPT-4 from a YAML file, or evaluate a checkpoint.

Look before you load, on any machine, no weights needed:
    python train.py --cfg-path train_configs/minigpt4_flickr_finetune.yaml --check
One process (a GPU, or the CPU if there is none), then 4 GPUs:
    python train.py --cfg-path FILE
    torchrun --nproc-per-node 4 train.py --cfg-path FILE
Change single values; go on after a stop or a crash:
    torchrun --nproc-per-node 4 train.py --cfg-path FILE --options run.seed=7 run.resume_ckpt_path=auto
Measure a checkpoint on the splits of `run.test_splits`, without training:
    python train.py --cfg-path FILE --options run.evaluate=True run.test_splits=[test] model.ckpt=CKPT
"""

import argparse
import logging
import sys

from minigpt4.common import start_clock
from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.logger import setup_logging
from minigpt4.common.start_clock import phase
from minigpt4.common.utils import quick_imports

log = logging.getLogger("train")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    parser.add_argument("--check", action="store_true", help="validate, print parameters and GPU memory, and stop")
    parser.add_argument("--gpus", type=int, help="with --check: GPUs of the run (the launcher's, or run.world_size)")
    parser.add_argument("--gpu-gib", type=float, help="with --check: GPU memory to fit in (what is free, else 23.6)")
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # of old launchers, beside LOCAL_RANK
    return parser.parse_args(argv)


def train(cfg: Config) -> None:
    """Build everything in order, the cheap and fallible first, and train, or evaluate."""
    with phase(start_clock.IMPORTS), quick_imports():  # which a fault of the configuration has not waited for
        from minigpt4.common.dist_utils import seed_everything, start_processes, stop_processes
        from minigpt4.datasets import first_sample
        from minigpt4.runners import choose_folder, get_runner_class
        from minigpt4.tasks import setup_task

    with phase(start_clock.PROCESSES):
        processes = start_processes(cfg.run.device, cfg.run.distributed, cfg.run.dist_url)
    setup_logging(processes.rank)
    cfg, folder = choose_folder(cfg, processes)
    seed_everything(cfg.run.seed + processes.rank)
    log.info("Configuration of %s:\n%s", cfg.source, cfg.pretty())

    runner_class = get_runner_class(cfg)
    task = setup_task(cfg)
    with phase(start_clock.DATA):
        datasets = task.build_datasets(cfg)
        for splits in datasets.values():
            for dataset in splits.values():
                log.info("%s", first_sample(dataset))  # faults of the data before minutes of loading
    model = task.build_model(cfg, processes.device)
    runner = runner_class(cfg, folder.job_id, task, model, datasets, processes)

    if cfg.run.evaluate:
        runner.evaluate()
        end = "Evaluation finished"
    else:
        end = "Training finished" if runner.train() else "Training stopped"
    log.info("%s; everything is in %s", end, folder.path)
    stop_processes()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error that the user can fix."""
    start_clock.begin()
    args = parse_args(argv)
    setup_logging(rank=0)
    try:
        with phase(start_clock.CONFIGURATION):
            cfg = Config(args).validate(training=not args.check)  # faults of the file before torch loads
        if args.check:
            with quick_imports():
                from minigpt4.check import check
            print(check(cfg, args.gpu_gib, args.gpus))
            return 0
        require_paths(cfg.sections(), cfg.source)
        train(cfg)
    except MiniGPT4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
