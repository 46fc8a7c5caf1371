"""How well the rules of the failure rate agree with labelled texts.

    python eval_scripts/check_failure_rules.py                      # the labelled texts of the tests
    python eval_scripts/check_failure_rules.py MY_LABELS.jsonl

A line of the file is {"part": "held out", "task": "poem", "ended": true, "kinds": ["repetition"], "text": "..."}.
`kinds` is empty for a good answer, `ended` null if unknown. Each part is reported separately.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, MiniGPT4Error, errors_as
from minigpt4.common.utils import LINE_END, decode, parse_json
from minigpt4.evaluation.failure_rules import RULED_KINDS, find_failures, task_called
from minigpt4.evaluation.report import Table

LABELS = Path(__file__).parents[1] / "tests" / "data" / "failures.jsonl"
ANY = "any failure"


@dataclass(frozen=True)
class Checked:
    """A labelled text and what the rules find in it."""

    label: Mapping[str, Any]
    found: set[str]

    @property
    def wanted(self) -> set[str]:
        """The kinds of the label."""
        return set(self.label["kinds"])


def read_labels(file: Path) -> list[Mapping[str, Any]]:
    """The lines of a file; ConfigError for one that is no label."""
    labels = []
    with errors_as(ConfigError, f"{file}: cannot be read"):
        lines = LINE_END.split(decode(file.read_bytes()))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        with errors_as(ConfigError, f"{file}:{number}: not a label; see --help"):
            label = parse_json(line)
            unknown = set(label["kinds"]) - set(RULED_KINDS)
            _ = label["part"], label["task"], label["ended"], label["text"]
        if unknown:
            raise ConfigError(f"{file}:{number}: kinds: {', '.join(sorted(unknown))}; known: {', '.join(RULED_KINDS)}")
        labels.append(label)
    return labels


def check(label: Mapping[str, Any]) -> Checked:
    """Apply the rules to a labelled text."""
    found = find_failures(label["text"], task_called(label["task"]).form, label["ended"])
    return Checked(label, {failure.kind for failure in found})


def agreement(checked: Sequence[Checked]) -> Table:
    """Precision and recall of every kind, and of "fails or not", which is what the rate counts."""
    rows = [_row(kind, [(kind in one.wanted, kind in one.found) for one in checked]) for kind in RULED_KINDS]
    rows.append(_row(ANY, [(bool(one.wanted), bool(one.found)) for one in checked]))
    return Table(["kind", "labelled", "found", "precision", "recall"], rows)


def _row(kind: str, pairs: Sequence[tuple[bool, bool]]) -> list[str]:
    labelled, found = (sum(pair[side] for pair in pairs) for side in (0, 1))
    both = sum(wanted and got for wanted, got in pairs)
    return [kind, str(labelled), str(found), _share(both, found), _share(both, labelled)]


def _share(count: int, of: int) -> str:
    return f"{count / of:.2f}" if of else "-"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="?", type=Path, default=LABELS, metavar="FILE", help="labelled texts")
    args = parser.parse_args(argv)
    try:
        checked = [check(label) for label in read_labels(args.labels)]
    except MiniGPT4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part in dict.fromkeys(one.label["part"] for one in checked):
        own = [one for one in checked if one.label["part"] == part]
        print(f"{part}: {len(own)} texts\n\n{agreement(own).markdown()}")
        for one in own:
            if one.found != one.wanted:
                wanted, found = (", ".join(sorted(kinds)) or "fine" for kinds in (one.wanted, one.found))
                print(f"- {one.label['task']}, labelled {wanted}, found {found}: {one.label['text'][:100]!r}")
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
