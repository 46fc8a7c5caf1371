"""Train MiniGPT-4 from a YAML file.

Look before you load, on any machine, no weights needed:
    python train.py --cfg-path train_configs/minigpt4_flickr_finetune.yaml --check
Change single values:
    python train.py --cfg-path FILE --check --options model.llm_grad_checkpoint=True run.seed=7
"""

import argparse
import logging
import sys

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, MiniGPT4Error
from minigpt4.common.experiment import read_experiment


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="values that go over the file's")
    parser.add_argument("--check", action="store_true", help="validate, print parameters and GPU memory, and stop")
    parser.add_argument("--gpu-gib", type=float, help="with --check: GPU memory to fit in (this GPU's, else 24)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error that the user can mend."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)s] %(message)s")
    try:
        config = Config(args)
        read_experiment(config)  # faults of the file first, before torch loads
        if not args.check:
            raise ConfigError("this version checks configurations and builds models; training comes with the runner")
        from minigpt4.check import check

        print(check(config, args.gpu_gib))
    except MiniGPT4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
