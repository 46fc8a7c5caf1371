"""Convert the pickled weights of an LLM (pytorch_model*.bin) into safetensors, once.

    python scripts/to_safetensors.py weights/vicuna-7b                       # beside the .bin files
    python scripts/to_safetensors.py weights/vicuna-7b --output /data/vicuna-7b-safetensors
    python scripts/to_safetensors.py weights/vicuna-7b --output /data/vicuna-7b-bf16 --dtype bf16
Whatever reads the directory takes safetensors where there are any, so nothing else has to be set, and the .bin files
may then be deleted. The tensors are the same to the bit unless --dtype changes their type. A conversion that was
stopped goes on when the same command is run again; until it is whole the .bin files are what is read. More:
docs/weights.md.
"""

import argparse
import logging
import sys
from pathlib import Path

from minigpt4.common.utils import exit_status


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder of the LLM, with config.json and pytorch_model*.bin")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the new files go (the same folder)")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="type of the new weights (as they are)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Convert, and say what there is now."""
    from minigpt4.common.llm_conversion import to_safetensors

    target = args.output or args.directory
    written = to_safetensors(args.directory, target, args.dtype)
    size = sum(path.stat().st_size for path in written) / 1e9
    print(f"{target}: {len(written)} files written, {size:.1f} GB" if written else f"{target}: nothing to do")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read, 130 stopped by Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args(argv)
    try:
        return exit_status(lambda: run(args))
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
