"""Make LLaVA's three kinds of instruction data from captions and boxes, by a language model that reads text alone.

    python scripts/make_instructions.py --captions annotations/captions_train2017.json \
        --instances annotations/instances_train2017.json --output output/instructions \
        --judge-url https://api.openai.com/v1 --judge-model gpt-4o --count 1000 --dry-run
Without --dry-run it asks; with `--options price_in=2.5 price_out=10 cost_limit=20` (for a million tokens) it stops
before it costs more. An endpoint of this machine, and the mini world, whose files `python -m minigpt4.mini.files
data/mini/llava` writes:
    python scripts/make_instructions.py --captions data/mini/llava/captions_train.json \
        --instances data/mini/llava/instances_train.json --output output/instructions \
        --judge-url http://localhost:8000/v1 --judge-model my-model
The same command resumes, and asks nothing twice. docs/curation.md says what is refused.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from minigpt4.common.binding import bind
from minigpt4.common.config_files import parse_options, to_plain
from minigpt4.common.errors import ConfigError, first_few, hint
from minigpt4.common.schemas import EndpointConfig
from minigpt4.common.utils import as_json
from minigpt4.curation.instructions import ENDS, KINDS, InstructionGenerator, assign, read_images, read_prompts
from minigpt4.evaluation import command
from minigpt4.evaluation.hallucination import COCO_OBJECTS, ObjectNames, mini_objects, read_synonyms
from minigpt4.evaluation.report import Table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    parser.add_argument("--captions", required=True, type=Path, metavar="FILE", help="COCO's captions_*.json")
    parser.add_argument("--instances", required=True, type=Path, metavar="FILE", help="COCO's instances_*.json")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for all files")
    parser.add_argument(
        "--count",
        nargs="+",
        metavar="[KIND=]N",
        help="records, all together (58 : 23 : 77) or of each kind: conversation=N detail=N complex_reasoning=N "
        "(one an image)",
    )
    parser.add_argument("--prompts", type=Path, default=Path("prompts/instructions"), metavar="DIR", help="own prompts")
    parser.add_argument("--synonyms", type=Path, metavar="FILE", help="names of the objects (COCO's, the mini world's)")
    parser.add_argument(
        "--leave-out-review", action="store_true", help="no answer to train on that names objects which are not given"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be asked and what it may cost; repeats come on top"
    )
    parser.add_argument(
        "--options",
        nargs="*",
        metavar="KEY=VALUE",
        help="of the endpoint: max_tokens, temperature, attempts, requests_per_minute, tokens_per_minute, price_in, "
        "price_out, cost_limit",
    )
    command.add_judge_arguments(parser, required=True)
    return parser.parse_args(argv)


def read_counts(words: Sequence[str] | None) -> dict[str, int] | None:
    """`--count` as records by kind; ConfigError if it is none."""
    counts: dict[str, int] = {}
    for word in words or []:
        kind, _, number = word.rpartition("=")
        if not number.isdecimal() or (kind == "" and len(words) > 1):
            raise ConfigError(f"--count {word}: write a number, or KIND=NUMBER for some kinds")
        if kind and kind not in KINDS:
            raise ConfigError(f"--count {word}: unknown kind; {hint(kind, KINDS)}")
        counts[kind] = int(number)
    if "" in counts:
        ends = [0, *(round(counts[""] * end / ENDS[-1]) for end in ENDS)]
        counts = {kind: end - start for kind, (start, end) in zip(KINDS, pairwise(ends), strict=True)}
    return counts or None


def read_names(categories: set[str], synonyms: Path | None) -> ObjectNames:
    """Names of objects, of a file or those that the categories are of; ConfigError if one is not among them."""
    for names in [read_synonyms(synonyms)] if synonyms else [read_synonyms(COCO_OBJECTS), mini_objects()]:
        unknown = sorted(name for name in categories if names.name_of(name) is None)
        if not unknown:
            return names
    lists = synonyms or "the lists of COCO and of the mini world"
    raise ConfigError(f"--synonyms: {lists} lacks {first_few(unknown)}; give a file with one object per line")


def run(args: argparse.Namespace) -> None:
    """Cheap checks first, then ask."""
    counts, prompts = read_counts(args.count), read_prompts(args.prompts)
    own, fixed = to_plain(parse_options(args.options), "--options"), {"url": args.judge_url, "model": args.judge_model}
    endpoint = bind(EndpointConfig, own | fixed, section="endpoint", source="--options")
    changes = {name: getattr(endpoint, name) for name in own if name not in fixed}
    judge = command.judge_of(args, args.output / "requests.jsonl", **changes)
    images = read_images(args.captions, args.instances)
    names = read_names({category for image in images for category, _ in image.boxes}, args.synonyms)
    work = assign(images, prompts, counts)
    generator = InstructionGenerator(
        judge, prompts, names, args.output, "leave out" if args.leave_out_review else "keep"
    )
    if args.dry_run:
        print(as_json({"records": len(work), **generator.plan(work)}), end="")
        return
    report = generator.make(work)
    _show(report)
    print(f"requests: {json.dumps(judge.account.totals())}\n{args.output}")


def _show(report: dict) -> None:
    columns = ("asked", "kept", "kept_at_second", "to_review")
    rows = []
    for kind, own in report["kinds"].items():
        dropped = ", ".join(f"{count} {rule}" for rule, count in own["dropped"].items())
        rows.append([kind, *(str(own[name]) for name in columns), dropped or "0"])
    print(Table(["kind", *(name.replace("_", " ") for name in columns), "dropped"], rows).markdown())
    for what in ("refused_answers", "possible_inventions"):
        found = ", ".join(f"{count} {name}" for name, count in report["kinds"]["all"][what].items())
        print(f"{what.replace('_', ' ')}: {found or 'none'}")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return command.main(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
