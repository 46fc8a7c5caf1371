"""Look through the datasets of a YAML before training on them.

    python -m minigpt4.datasets.check CFG          texts of all records, images that must be there; one shard
    python -m minigpt4.datasets.check CFG --full   reads and decodes everything
    python -m minigpt4.datasets.check CFG --options datasets.birds.build_info.ann_path=birds.jsonl

Prints a sample and the counts of each dataset, in each split that the run uses, and every bad record with its
line. Exit status: 0 all good, 1 something is bad, 2 the configuration is wrong.
"""

import argparse
import logging
import sys
from collections.abc import Iterator

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.errors import SampleError
from minigpt4.common.utils import exit_status
from minigpt4.datasets.builders.base_dataset_builder import build_datasets
from minigpt4.datasets.data_utils import first_sample
from minigpt4.datasets.datasets.base_dataset import BaseDataset, ReaderSlot, iter_once


def datasets_of(config: Config) -> Iterator[BaseDataset]:
    """Every dataset, in the splits that the run uses; ConfigError for faults and missing paths."""
    require_paths({f"datasets.{name}": section for name, section in config.datasets.items()}, config.source)
    splits = dict.fromkeys([*config.run.train_splits, *config.run.valid_splits, *config.run.test_splits])
    for own in build_datasets(config.datasets, list(splits)).values():
        yield from own.values()


def report(dataset: BaseDataset, full: bool) -> tuple[list[str], bool]:
    """Lines about a dataset, and whether all of it is good."""
    try:
        first = first_sample(dataset)
    except SampleError as error:
        first = str(error)
    good, faults = 0, []
    everything = (sample for _, sample in iter_once(dataset, ReaderSlot(0, 1)))
    for sample in everything if full else dataset.quick_samples():
        try:
            sample.load()
            good += 1
        except SampleError as error:
            faults.append(f"  bad: {error}")
    how = "read" if full else "looked at (--full reads everything)"
    summary = f"{dataset.label}: {good + len(faults):,} samples {how}: {good:,} good, {len(faults):,} bad"
    return [first, *faults, summary], not faults


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cfg_path", metavar="CFG", help="YAML file of a run")
    parser.add_argument("--full", action="store_true", help="decode every image and read every shard")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)s] %(message)s")
    all_good = []

    def check() -> None:
        for dataset in datasets_of(Config(args).validate(training=False)):
            lines, good = report(dataset, args.full)
            all_good.append(good)
            sys.stdout.write("\n".join(lines) + "\n")

    return exit_status(check) or int(not all(all_good))


if __name__ == "__main__":
    sys.exit(main())
