"""Several checkpoints in one run of eval_flickr30k.py against a process for each: times, ratio, and that both agree.

    python benchmarks/evaluate_checkpoints.py --cfg-path eval_configs/mini_flickr_eval.yaml --run RUN \
        --images 100 --repeats 3 --metrics BLEU CIDEr ROUGE-L --write docs/performance.md
    python benchmarks/evaluate_checkpoints.py --cfg-path FILE --ckpt pretrained=a.pth checkpoint_0.pth checkpoint_1.pth
Prints a Markdown section; `--write` puts it between its marks in a file, or at the end of one without them. Times are
those of whole processes, from start to exit, in fresh folders. Captions or scores that differ are an error.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tables import REPOSITORY, machine, write_section

from minigpt4.common.command_line import exit_status
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.experiment import read_experiment
from minigpt4.datasets.records import Records
from minigpt4.evaluation.caption_metrics import FAMILIES
from minigpt4.evaluation.report import JSON

SCRIPT = REPOSITORY / "eval_scripts" / "eval_flickr30k.py"
EPOCH = re.compile(r"checkpoint_(\d+)\.pth")
SHOWN_OF_ERROR = 3000


@dataclass(frozen=True)
class Timing:
    """Seconds of one repeat, whole processes."""

    together: float
    """One process, all checkpoints."""

    apart: float
    """A process for each checkpoint, one after the other, summed."""

    @property
    def ratio(self) -> float:
        """How many times faster one process is."""
        return self.apart / self.together


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the evaluation")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--ckpt", nargs="+", metavar="[NAME=]PATH", help="checkpoints, two or more")
    chosen.add_argument("--run", type=Path, help="run folder: its checkpoint_0.pth, checkpoint_1.pth, ...")
    parser.add_argument("--images", type=int, help="the first so many images of the test file (all)")
    parser.add_argument("--repeats", type=int, default=3, help="measure so often, in turn (3)")
    parser.add_argument("--metrics", nargs="+", choices=FAMILIES, default=["BLEU", "CIDEr", "ROUGE-L"])
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="values over the file's")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the section into this file, too")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> str:
    """The Markdown section; ConfigError or RunError with the reason if it cannot be measured."""
    checkpoints = args.ckpt or _of_run(args.run)
    if len(checkpoints) < 2 or args.repeats < 1:
        raise ConfigError("it takes two checkpoints and one repeat at least")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [*args.options, *_limit(args, folder)]
        timings = []
        for number in range(args.repeats):
            timings.append(_repeat(args, checkpoints, options, folder / str(number), apart_first=bool(number % 2)))
            print(f"repeat {number + 1}: {timings[-1]}", file=sys.stderr)
        facts = json.loads((folder / "0" / "together" / JSON).read_text(encoding="utf-8"))
    return section(args, facts, timings)


def _of_run(run: Path) -> list[str]:
    files = [(int(found[1]), path) for path in run.glob("*.pth") if (found := EPOCH.fullmatch(path.name))]
    return [str(path) for _, path in sorted(files)]


def _limit(args: argparse.Namespace, folder: Path) -> list[str]:
    """The option that takes the first images only."""
    if args.images is None:
        return []
    config = Config(SimpleNamespace(cfg_path=args.cfg_path, options=args.options))
    ((name, dataset),) = read_experiment(config, training=False).datasets.items()
    if dataset.build_info.split_field or not dataset.build_info.test_ann_path:
        raise ConfigError("--images: needs a dataset with a file of its own for the test split, test_ann_path")
    records = Records(Path(dataset.build_info.test_ann_path))
    lines = [json.dumps(records[index]) + "\n" for index in range(min(args.images, len(records)))]
    (folder / "first.jsonl").write_text("".join(lines), encoding="utf-8")
    return [f"datasets.{name}.build_info.test_ann_path={folder / 'first.jsonl'}"]


def _repeat(
    args: argparse.Namespace, checkpoints: Sequence[str], options: Sequence[str], folder: Path, *, apart_first: bool
) -> Timing:
    """Both ways once; RunError unless they give the same."""
    lists = {"together": list(checkpoints)} | {f"apart_{n}": [one] for n, one in enumerate(checkpoints)}
    order = sorted(lists, key=lambda name: (name == "together") == apart_first)
    seconds = {name: _evaluate(args, lists[name], options, folder / name) for name in order}
    together = _results(folder / "together")
    apart = [entry for n in range(len(checkpoints)) for entry in _results(folder / f"apart_{n}")]
    for one, other in zip(together, apart, strict=True):
        if one != other:
            raise RunError(f"captions or scores of {one['name']!r} are not those of its own process, {other['name']!r}")
    return Timing(seconds.pop("together"), sum(seconds.values()))


def _evaluate(args: argparse.Namespace, checkpoints: Sequence[str], options: Sequence[str], folder: Path) -> float:
    """Seconds of one process; RunError with the end of what it said if it fails."""
    command = [sys.executable, str(SCRIPT), "--cfg-path", args.cfg_path, "--ckpt", *checkpoints]
    command += ["--save_path", str(folder), "--metrics", *args.metrics, *(["--options", *options] if options else [])]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if result.returncode:
        raise RunError(f"{' '.join(command)} failed:\n{result.stderr[-SHOWN_OF_ERROR:]}")
    return time.perf_counter() - start


def _results(folder: Path) -> list[dict[str, Any]]:
    """Name, scores and captions of each checkpoint."""
    rows = json.loads((folder / JSON).read_text(encoding="utf-8"))["checkpoints"]
    said = [json.loads((folder / row["captions"]).read_text(encoding="utf-8")) for row in rows]
    return [{"name": r["name"], "scores": r["scores"], "captions": text} for r, text in zip(rows, said, strict=True)]


def section(args: argparse.Namespace, facts: dict[str, Any], timings: Sequence[Timing]) -> str:
    """Command, machine and table as Markdown."""
    count = len(facts["checkpoints"])
    rows = [
        (f"one process, {count} checkpoints, s", [timing.together for timing in timings], 1),
        (f"{count} processes, one after the other, s", [timing.apart for timing in timings], 1),
        ("times faster", [timing.ratio for timing in timings], 2),
    ]
    lines = [
        "## Several checkpoints in one run",
        "",
        f"{count} checkpoints on {facts['images']} images ({facts['data']}, `{Path(args.cfg_path).name}`, beams "
        f"{facts['decoding']['num_beams']}, at most {facts['decoding']['max_new_tokens']} tokens, batches of "
        f"{facts['batch_size']}), scored with {', '.join(facts['metrics'])}. Whole processes, from start to exit; "
        f"{_times(len(timings))}, the two ways in turn. Captions and scores of both ways are identical.",
        "",
        f"    python benchmarks/evaluate_checkpoints.py {_command(args)}",
        "",
        f"Machine: {machine()}.",
        "",
        "| what | median | lowest | highest |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | {statistics.median(v):.{n}f} | {min(v):.{n}f} | {max(v):.{n}f} |" for name, v, n in rows),
    ]
    return "\n".join(lines) + "\n"


def _times(count: int) -> str:
    return "measured once" if count == 1 else f"measured {count} times"


def _command(args: argparse.Namespace) -> str:
    """The arguments without the places of this machine."""
    given = f"--cfg-path {_short(args.cfg_path)} {'--run RUN' if args.run else '--ckpt ...'} --repeats {args.repeats}"
    return given + (f" --images {args.images}" if args.images else "") + f" --metrics {' '.join(args.metrics)}"


def _short(path: str) -> str:
    full = Path(path).resolve()
    return str(full.relative_to(REPOSITORY) if full.is_relative_to(REPOSITORY) else full.name)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """The section for the terminal and, if asked for, in a file."""
    text = measure(args)
    print(text)
    if args.write:
        write_section(args.write, "evaluate_checkpoints", text)


if __name__ == "__main__":
    sys.exit(main())
