"""Verdicts of people on answers: one line a verdict, the last one on an answer counts."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.json_lines import JsonLines
from minigpt4.evaluation.failures.answers import AskedAnswer
from minigpt4.evaluation.failures.rules import KINDS

FILE = "verdicts.jsonl"


def read_verdicts(file: Path) -> dict[str, list[str]]:
    """Kinds of failure by the key of the answer, none for a good one; ConfigError if there is no file."""
    if not file.is_file():
        raise ConfigError(f"--verdicts: there is no file {file}; eval_scripts/judge_by_hand.py writes it")
    return _by_key(JsonLines(file).read())


def _by_key(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {record["answer"]: record["kinds"] for record in records if _is_verdict(record)}


def _is_verdict(record: Mapping[str, Any]) -> bool:
    kinds = record.get("kinds")
    return isinstance(record.get("answer"), str) and isinstance(kinds, list) and set(kinds) <= set(KINDS)


class Sitting:
    """One person who goes through answers in an order that tells nothing of the checkpoints.

    Args:
        answers: of all checkpoints; equal ones about an image are shown once.
        file: of the verdicts; those in it are not asked again.
        seed: of the order.
    """

    def __init__(self, answers: Sequence[AskedAnswer], file: Path, seed: int) -> None:
        self.answers = list({answer.key: answer for answer in answers}.values())
        self.answers.sort(key=lambda answer: answer.key)  # not by checkpoint, however the file was written
        random.Random(seed).shuffle(self.answers)
        self._lines = JsonLines(file)
        self._lines.keep(_is_verdict)
        self.verdicts = _by_key(self._lines.read())

    @property
    def judged(self) -> int:
        """Answers with a verdict."""
        return sum(answer.key in self.verdicts for answer in self.answers)

    def next_after(self, place: int) -> int:
        """Place of the first answer after `place` that has no verdict; the number of answers if there is none."""
        places = range(place + 1, len(self.answers))
        return next((other for other in places if self.answers[other].key not in self.verdicts), len(self.answers))

    def judge(self, place: int, kinds: Sequence[str]) -> None:
        """Keep a verdict, at once."""
        key = self.answers[place].key
        self.verdicts[key] = list(kinds)
        self._lines.append({"answer": key, "kinds": self.verdicts[key]})
