"""What a measurement of the failure rate leaves: the table in the published form, and every failure with its text.

No file holds a time or the number of processes: the same measurement writes the same bytes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minigpt4.common.output_files import as_json, write_whole
from minigpt4.evaluation.checkpoint_list import NamedCheckpoint
from minigpt4.evaluation.failures.answers import AskedAnswer, write_answers
from minigpt4.evaluation.failures.rules import JUDGED_KINDS, KINDS, RULED_KINDS
from minigpt4.evaluation.failures.tasks import Task
from minigpt4.evaluation.proportions import wilson
from minigpt4.evaluation.tables import Table

JSON, MARKDOWN, ANSWERS = "failures.json", "failures.md", "answers.json"


@dataclass(frozen=True)
class FailureReport:
    """Everything that is reported."""

    checkpoints: Sequence[NamedCheckpoint]
    tasks: Sequence[Task]
    answers: Sequence[AskedAnswer]
    """Of every checkpoint to every task about every image, with their failures."""

    setup: Mapping[str, Any]
    """Prompts, decoding, versions, judge: the same for all checkpoints."""

    def write(self, folder: Path) -> None:
        """Write every file, `failures.json` last; ConfigError if the disk refuses."""
        write_answers(folder / ANSWERS, self.answers)
        write_whole(folder / MARKDOWN, self.markdown())
        write_whole(folder / JSON, as_json(self.facts))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of `failures.json`."""
        return {
            "images": len({answer.image_id for answer in self.answers}),
            "tasks": {task.name: task.title for task in self.tasks},
            **self.setup,
            "notes": self._notes(),
            "checkpoints": [self._checkpoint(checkpoint) for checkpoint in self.checkpoints],
            "failures": [_failure(answer) for answer in self.answers if answer.failures],
        }

    def _checkpoint(self, checkpoint: NamedCheckpoint) -> dict[str, Any]:
        own = [answer for answer in self.answers if answer.checkpoint == checkpoint.name]
        by_task = {task.name: [answer for answer in own if answer.task == task.name] for task in self.tasks}
        return {
            "name": checkpoint.name,
            "file": str(checkpoint.path),
            "sha256": checkpoint.sha256,
            "tasks": {name: _rate(answers) for name, answers in by_task.items()},
            "card": checkpoint.card,
        }

    def _notes(self) -> list[str]:
        """What a reader has to know about the numbers."""
        notes = [
            "An answer fails if it is at least one of: " + ", ".join(self._kinds()) + ".",
            "In brackets: 95% Wilson interval.",
        ]
        unknown = sum(answer.ended is None for answer in self.answers)
        if unknown:
            notes.append(f"Of {unknown} answers nobody wrote down how they ended; they cannot count as cut off.")
        if judge := self.setup["judge"]:
            notes.append(f"Judge: {judge['model']} at {judge['url']}.")
            if judge["unread_replies"]:
                notes.append(f"The judge's reply to {judge['unread_replies']} answers could not be read.")
        else:
            notes.append(f"No judge was asked, so nothing counts as {' or '.join(JUDGED_KINDS)} by itself.")
        if by_hand := self.setup["judged_by_hand"]:
            notes.append(
                f"A person judged {by_hand} of {len(self.answers)} answers, and these verdicts count in place of all "
                f"others; on {self.setup['agreed_with_person']} of them the others agree on whether the answer fails."
            )
        return notes

    def _kinds(self) -> list[str]:
        """The kinds that could be found."""
        is_judged = self.setup["judge"] or self.setup["judged_by_hand"]
        return list(KINDS if is_judged else RULED_KINDS)

    def markdown(self) -> str:
        """The content of `failures.md`."""
        facts = self.facts
        decoding = ", ".join(f"{key} {value}" for key, value in self.setup["decoding"].items())
        lines = [*facts["notes"], f"Decoding, the same for all checkpoints: {decoding}."]
        lines += [f"Prompt of {name}: `{prompt!r}`" for name, prompt in self.setup["prompts"].items()]
        lines.append(f"Stop: `{self.setup['stop']}`")
        parts = [f"# {headline(facts)}", rate_table(facts).markdown(), "\n".join(f"- {line}" for line in lines)]
        parts += [f"## Answers by kind\n\n{self._kind_table().markdown()}", *self._listed()]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def _kind_table(self) -> Table:
        rows = []
        for one in self.facts["checkpoints"]:
            for name, rate in one["tasks"].items():
                counts = [str(rate["kinds"].get(kind, 0)) for kind in self._kinds()]
                rows.append([one["name"], name, *counts, str(rate["failed"])])
        return Table(["checkpoint", "task", *self._kinds(), "any"], rows)

    def _listed(self) -> Iterator[str]:
        """A section a kind, with every answer and what shows the failure."""
        for kind in KINDS:
            found = [(answer, one) for answer in self.answers for one in answer.failures if one.kind == kind]
            if found:
                yield f"## {kind}: {len(found)}"
            for answer, one in found:
                text = "\n".join(f"    {line}" for line in answer.text.splitlines() or [""])
                yield f"**{answer.checkpoint}**, {answer.task}, {answer.image_id}: {one.evidence}\n\n{text}"


def _rate(answers: Sequence[AskedAnswer]) -> dict[str, Any]:
    failed = sum(bool(answer.failures) for answer in answers)
    kinds = Counter(failure.kind for answer in answers for failure in answer.failures)
    return {
        "images": len(answers),
        "failed": failed,
        "rate": failed / len(answers),
        "interval": wilson(failed, len(answers)),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
    }


def _failure(answer: AskedAnswer) -> dict[str, Any]:
    return {
        "checkpoint": answer.checkpoint,
        "task": answer.task,
        "image_id": answer.image_id,
        "kinds": {failure.kind: failure.evidence for failure in answer.failures},
        "ended": answer.ended,
        "text": answer.text,
    }


def headline(facts: Mapping[str, Any]) -> str:
    """What was measured."""
    return f"Failure rate, {facts['images']} images"


def rate_table(facts: Mapping[str, Any]) -> Table:
    """The published form: a row a checkpoint, a column a task, with 95% intervals."""
    rows = [[one["name"], *(_cell(one["tasks"][name]) for name in facts["tasks"])] for one in facts["checkpoints"]]
    return Table(["checkpoint", *facts["tasks"].values()], rows)


def _cell(rate: Mapping[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['rate']:.1%} ({low:.1%} - {high:.1%})"


def summary(facts: Mapping[str, Any]) -> str:
    """What the terminal shows of `failures.json`."""
    return "\n".join([headline(facts), "", rate_table(facts).markdown(), *facts["notes"]])
