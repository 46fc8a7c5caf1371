"""Pretrain the mini world's vision encoder and Q-Former from scratch; the result is shipped in minigpt4/mini/weights.

python scripts/pretrain_mini_vision.py --dir output/mini_vision
python scripts/pretrain_mini_vision.py --dir /tmp/try --scenes 500 --steps 20  # does it run?
"""

import argparse
import logging
import os
from dataclasses import fields
from pathlib import Path

import torch

from minigpt4.mini import files
from minigpt4.mini.pretraining import Settings, pretrain
from minigpt4.models.base_model import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("output/mini_vision"), help="what it writes")
    parser.add_argument("--llm", type=Path, default=Path("data/mini/smollm2-135m-instruct"), help="written if missing")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="bf16: faster on CPUs that have it")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that draw scenes")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    settings = Settings(**{field.name: arguments[field.name] for field in fields(Settings)})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)s] %(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files.write_language_model(arguments["llm"])
    codes = files.word_codes(files.word_embeddings(arguments["llm"], files.WORDS))
    result = pretrain(settings, codes, arguments["dir"], device, DTYPES[arguments["dtype"]], arguments["processes"])
    print(result)


if __name__ == "__main__":
    main()
