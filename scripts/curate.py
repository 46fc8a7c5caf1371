"""Make stage-2 data: a stage-1 model describes images, the texts are cleaned, filtered, reviewed and exported.

The mini world, on a CPU (docs/curation.md has the way to a stage-2 model):
    python scripts/curate.py run --cfg-path eval_configs/mini_curation.yaml --output output/mini/curation
The published recipe, on 4 GPUs, step by step:
    python scripts/curate.py select --cfg-path eval_configs/minigpt4_curation.yaml --images cc3m --output curation
    torchrun --standalone --nproc-per-node 4 scripts/curate.py generate --cfg-path eval_configs/minigpt4_curation.yaml \
        --ckpt weights/minigpt4_stage1_7b.pth --output curation
    python scripts/curate.py refine --refine endpoint --dry-run --cfg-path ... --output curation
    python scripts/curate.py review curation
The same command goes on after a kill. `run` does select, generate, refine, filter, export and the report.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt4.common.binding import bind, require_paths
from minigpt4.common.config import Config
from minigpt4.common.curation_schema import CurationConfig
from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import as_json, exit_status, quick_imports, require_packages
from minigpt4.curation.records import PACKAGES, CurationFolder, text_of

log = logging.getLogger("curate")

STEPS = ("select", "generate", "refine", "filter", "export", "report")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line, but for `review`, which has its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*STEPS, "run", "review"], help="one step, or all; review --help has its own")
    parser.add_argument("--cfg-path", required=True, help="YAML file with model:, run: and curation:")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the curation")
    parser.add_argument("--images", metavar="PATH", help="folder, list or tar shards (curation.select.images)")
    parser.add_argument("--ckpt", metavar="FILE", help="stage-1 checkpoint (model.ckpt)")
    parser.add_argument("--refine", choices=("endpoint", "rules", "none"), help="how (curation.refine.by)")
    parser.add_argument("--dry-run", action="store_true", help="what refine would send, and cost; nothing is sent")
    parser.add_argument("--retry-failed", action="store_true", help="try failed images and requests again")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    return parser.parse_args(argv)


class Command:
    """The steps of a configuration in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        require_packages("a curation", "curation", *PACKAGES)
        config = Config(args).validate(training=False)
        self.settings = bind(
            CurationConfig, config.merged.get("curation", {}), section="curation", source=config.source
        )
        if args.ckpt:
            config = config.replace(model=dataclasses.replace(config.model, ckpt=args.ckpt))
        if args.images:
            self.settings.select.images = args.images
        if args.refine:
            self.settings.refine.by = args.refine
        self.args, self.config, self.folder = args, config, CurationFolder(args.output)
        self.is_main = os.environ.get("RANK", "0") == "0"
        self._count: Callable[[str], int] | None = None
        if self.is_main:
            self.folder.hold()

    def run(self) -> None:
        """The steps that were asked for; processes beyond the first help to generate."""
        steps = STEPS if self.args.step == "run" else (self.args.step,)
        if self.args.step == "run":
            self._check()
        for step in steps:
            if self.is_main or step == "generate":
                getattr(self, step)()

    def _check(self) -> None:
        """What can be wrong is found before anything takes long."""
        from minigpt4.curation.refine import Refiner

        if self.args.dry_run:
            raise ConfigError("--dry-run: is for the step refine")
        Refiner(self.folder, self.settings.refine)
        self._require_model()

    def _require_model(self) -> None:
        require_paths({"model": self.config.model}, self.config.source)
        if not self.config.model.ckpt:
            raise ConfigError(f"--ckpt: is missing, and {self.config.source} has no model.ckpt")

    def select(self) -> None:
        from minigpt4.curation.images import select

        records = select(self.folder, self.settings.select, self.config.run.seed)
        self._say("select", records)

    def generate(self) -> None:
        self._require_model()
        with quick_imports():
            from minigpt4.common.dist_utils import start_processes, stop_processes
            from minigpt4.curation.generation import generate_descriptions

        run = self.config.run
        processes = start_processes(run.device, run.distributed, run.dist_url)
        setup_logging(processes.rank)
        retry = self.args.retry_failed
        records = generate_descriptions(self.folder, self.config, self.settings.generate, processes, retry_failed=retry)
        stop_processes()
        if records is not None:
            self._say("generate", records)

    def refine(self) -> None:
        from minigpt4.curation.refine import Refiner

        records, refiner = self.folder.read("generate"), Refiner(self.folder, self.settings.refine)
        if self.args.dry_run:
            print(as_json(refiner.plan(records, self.count)), end="")
            return
        made_from = {"input": self.folder.sha256("generate")}
        self._say("refine", refiner.run(records, made_from, self.args.retry_failed))

    def filter(self) -> None:
        from minigpt4.curation.filters import Evidence, HeldOut, filter_records

        records, settings = self.folder.read("refine"), self.settings.filter
        held_out = HeldOut.read(settings.test_sets) if settings.test_sets else None
        features = gains = None
        if settings.image_alike is not None or settings.likelihood is not None:
            with quick_imports():
                from minigpt4.curation.generation import image_features, image_gains

            self._require_model()
            if settings.image_alike is not None:
                features = image_features(self.folder, self.config, records)
            if settings.likelihood is not None:
                gains = image_gains(self.folder, self.config, self.settings.generate, records)
        filtered = filter_records(records, settings, Evidence(self.count, held_out, features, gains))
        made_from = {"input": self.folder.sha256("refine"), **dataclasses.asdict(settings)}
        self.folder.write("filter", filtered, made_from)
        self._say("filter", filtered)

    def export(self) -> None:
        from minigpt4.curation.export import FOLDER, export

        facts = export(self.folder, self.settings.export, self.config.run.seed)
        print(f"export: {facts['records']} of {facts['selected']} records: {self.folder.path / FOLDER}")

    def report(self) -> None:
        from minigpt4.curation.report import write_report
        from minigpt4.evaluation.limits import Account

        endpoint, ledger = self.settings.refine.endpoint, self.folder.path / "requests.jsonl"
        asked = endpoint is not None and ledger.is_file()
        results = write_report(self.folder, Account(endpoint, ledger).totals() if asked else None)
        for text in results["warnings"]:
            log.warning("%s", text)
        print(f"report: {self.folder.path / 'report.html'}")

    def count(self, text: str) -> int:
        """Tokens of the LLM."""
        if self._count is None:
            from minigpt4.curation.generation import token_counter

            self._count = token_counter(self.config)
        return self._count(text)

    def _say(self, step: str, records: list[dict[str, Any]]) -> None:
        left = sum("dropped" not in one for one in records)
        piled = sum("dropped" not in one and "review" in one for one in records)
        more = f", {piled} to be reviewed" if piled else ""
        words = [len(text_of(one).split()) for one in records if "dropped" not in one and text_of(one)]
        mean = f", {sum(words) / len(words):.0f} words on average" if words else ""
        print(f"{step}: {left} of {len(records)} records{more}{mean}: {self.folder.file(step)}")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    argv = sys.argv[1:] if argv is None else argv
    setup_logging(rank=0)
    if argv[:1] == ["review"]:
        from minigpt4.curation import review

        parser = argparse.ArgumentParser(prog="curate.py review", description=review.__doc__)
        review.add_arguments(parser)
        args = parser.parse_args(argv[1:])
        return exit_status(lambda: review.main(args))
    args = parse_args(argv)
    return exit_status(lambda: Command(args).run())


if __name__ == "__main__":
    sys.exit(main())
