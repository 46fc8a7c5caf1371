"""Several checkpoints evaluated in one run, in a run for each, and in a plain run for each: times, ratios, agreement.

    python benchmarks/evaluate.py --cfg-path eval_configs/mini_flickr_eval.yaml --run RUN \
        --images 100 --repeats 3 --metrics BLEU CIDEr ROUGE-L --write docs/performance.md
    python benchmarks/evaluate.py --cfg-path FILE --ckpt pretrained=a.pth checkpoint_0.pth checkpoint_1.pth --skip-plain
Prints a Markdown section; `--write` puts it between its marks in a file, or at the end of one without them. Times are
those of whole processes, from start to exit, in fresh folders. Captions or scores of eval_flickr30k.py that differ
between the ways are an error. The plain way is plain_evaluation.py; how many of its captions are the same is said.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from command import measured, parser_of, section
from plain_evaluation import RESULT, SCORERS
from tables import REPOSITORY, environment

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, RunError
from minigpt4.datasets.datasets.image_caption_json import Records
from minigpt4.evaluation.caption_run import JSON

SHOWN_OF_ERROR = 3000


@dataclass(frozen=True)
class Timing:
    """Seconds of one repeat, whole processes."""

    together: float
    """One process, all checkpoints."""

    apart: float
    """A process for each checkpoint, one after the other, summed."""

    plain: float = 0.0
    """A plain process for each checkpoint, summed."""

    same: int = 0
    """Captions of the plain processes that are those of the others."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the evaluation")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--ckpt", nargs="+", metavar="[NAME=]PATH", help="checkpoints, two or more")
    chosen.add_argument("--run", type=Path, help="run folder: its checkpoint_0.pth, checkpoint_1.pth, ...")
    parser.add_argument("--images", type=int, help="the first so many images of the test file (all)")
    parser.add_argument("--repeats", type=int, default=3, help="measure so often, in turn (3)")
    parser.add_argument("--metrics", nargs="+", choices=SCORERS, default=list(SCORERS))
    parser.add_argument("--skip-plain", action="store_true", help="do not measure the plain way")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="values over the file's")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, folder: Path) -> str:
    """The Markdown section; ConfigError or RunError with the reason if it cannot be measured."""
    epochs = [] if args.ckpt else [path.stem.removeprefix("checkpoint_") for path in args.run.glob("checkpoint_*.pth")]
    numbers = sorted(int(epoch) for epoch in epochs if epoch.isdigit())
    checkpoints = args.ckpt or [str(args.run / f"checkpoint_{number}.pth") for number in numbers]
    if len(checkpoints) < 2 or args.repeats < 1:
        raise ConfigError("it takes two checkpoints and one repeat at least")
    options = [*args.options, *_limit(args, folder)]
    timings = []
    for number in range(args.repeats):
        timings.append(repeat(args, checkpoints, options, folder / str(number), apart_first=bool(number % 2)))
        print(f"repeat {number + 1}: {timings[-1]}", file=sys.stderr)
    results = json.loads((folder / "0" / "together" / JSON).read_text(encoding="utf-8"))
    return report(args, results, timings)


def _limit(args: argparse.Namespace, folder: Path) -> list[str]:
    """The option that takes the first images only."""
    if args.images is None:
        return []
    config = Config(SimpleNamespace(cfg_path=args.cfg_path, options=args.options))
    ((name, dataset),) = config.validate(training=False).datasets.items()
    if dataset.build_info.split_field or not dataset.build_info.test_ann_path:
        raise ConfigError("--images: needs a dataset with a file of its own for the test split, test_ann_path")
    records = Records(Path(dataset.build_info.test_ann_path))
    lines = [json.dumps(records[index]) + "\n" for index in range(min(args.images, len(records)))]
    (folder / "first.jsonl").write_text("".join(lines), encoding="utf-8")
    return [f"datasets.{name}.build_info.test_ann_path={folder / 'first.jsonl'}"]


def repeat(
    args: argparse.Namespace, checkpoints: Sequence[str], options: Sequence[str], folder: Path, *, apart_first: bool
) -> Timing:
    """All ways once; RunError unless one run and several give the same."""
    script = REPOSITORY / "eval_scripts" / "eval_flickr30k.py"
    lists = {"together": list(checkpoints)} | {f"apart_{n}": [one] for n, one in enumerate(checkpoints)}
    seconds = {}
    for name in sorted(lists, key=lambda name: (name == "together") == apart_first):
        seconds[name] = run_script(args, script, ["--ckpt", *lists[name], "--save_path", str(folder / name)], options)
    together = _results(folder / "together")
    apart = [entry for n in range(len(checkpoints)) for entry in _results(folder / f"apart_{n}")]
    for one, other in zip(together, apart, strict=True):
        if one != other:
            raise RunError(f"captions or scores of {one['name']!r} are not those of its own process, {other['name']!r}")
    plain, same = 0.0, 0
    for number, (checkpoint, result) in enumerate(zip(checkpoints, together, strict=True)):
        if not args.skip_plain:
            own = folder / f"plain_{number}"
            given = ["--ckpt", checkpoint.split("=")[-1], "--save", str(own)]
            plain += run_script(args, REPOSITORY / "benchmarks" / "plain_evaluation.py", given, options)
            same += same_captions(result, json.loads((own / RESULT).read_text(encoding="utf-8")))
    return Timing(seconds.pop("together"), sum(seconds.values()), plain, same)


def same_captions(ours: dict[str, Any], plain: dict[str, Any]) -> int:
    """Captions that are the same; RunError if all are and a score is not."""
    same = sum(plain["captions"][one["image_id"]] == one["caption"] for one in ours["captions"])
    if same == len(ours["captions"]) and plain["scores"] != {name: ours["scores"][name] for name in plain["scores"]}:
        raise RunError(
            f"scores of {ours['name']!r} are not those of pycocoevalcap: {ours['scores']}, {plain['scores']}"
        )
    return same


def run_script(args: argparse.Namespace, script: Path, given: Sequence[str], options: Sequence[str]) -> float:
    """Seconds of a whole process; RunError with the end of what it said if it fails."""
    command = [sys.executable, str(script), *given, "--cfg-path", args.cfg_path, "--metrics", *args.metrics]
    command += ["--options", *options] if options else []
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    if result.returncode:
        raise RunError(f"{' '.join(command)} failed:\n{result.stderr[-SHOWN_OF_ERROR:]}")
    return time.perf_counter() - start


def _results(folder: Path) -> list[dict[str, Any]]:
    """Name, scores and captions of each checkpoint."""
    rows = json.loads((folder / JSON).read_text(encoding="utf-8"))["checkpoints"]
    said = [json.loads((folder / row["captions"]).read_text(encoding="utf-8")) for row in rows]
    return [{"name": r["name"], "scores": r["scores"], "captions": text} for r, text in zip(rows, said, strict=True)]


def report(args: argparse.Namespace, results: dict[str, Any], timings: Sequence[Timing]) -> str:
    """The Markdown section of what was measured."""
    count, decoding = len(results["checkpoints"]), results["decoding"]
    values = [
        (f"one run, {count} checkpoints, s", [timing.together for timing in timings], 1),
        (f"{count} runs, one after the other, s", [timing.apart for timing in timings], 1),
        (f"{count} runs / one run", [timing.apart / timing.together for timing in timings], 2),
    ]
    about_plain = ""
    if not args.skip_plain:
        values += [
            (f"{count} plain runs, one after the other, s", [timing.plain for timing in timings], 1),
            (f"{count} plain runs / {count} runs", [timing.plain / timing.apart for timing in timings], 2),
            (f"{count} plain runs / one run", [timing.plain / timing.together for timing in timings], 2),
        ]
        about_plain = (
            "\nA plain run is one of `benchmarks/plain_evaluation.py`: the same loading, then an image at a time by "
            "`generate` of transformers, the prompt once a beam and logits at all its positions, then pycocoevalcap as "
            f"it is. {min(timing.same for timing in timings)} of its {results['images'] * count} captions are those of "
            "the other runs: another shape of a batch rounds differently, and in 16 bits a near tie may fall the other "
            "way."
        )
    rows = [[name, *(f"{of(v):.{digits}f}" for of in (statistics.median, min, max))] for name, v, digits in values]
    text = (
        f"{count} checkpoints on {results['images']} images ({results['data']}, "
        f"`{Path(args.cfg_path).name}`, beams {decoding['num_beams']}, at most {decoding['max_new_tokens']} tokens, "
        f"batches of {results['batch_size']}), scored with {', '.join(results['metrics'])}. Whole processes, from "
        f"start to exit; rounds: {len(timings)}. A run is one of `eval_flickr30k.py`; captions and scores of one run "
        f"and of {count} are identical.{about_plain}"
    )
    head = ("what", "median", "lowest", "highest")
    return section(args, "evaluate", "## Several checkpoints in one run", text, head, rows)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return measured(parse_args(argv), "evaluate", measure)


if __name__ == "__main__":
    sys.exit(main())
