"""Answers whose failures are counted: what was asked, what was said, and who found what in it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.common.output_files import as_json, write_whole
from minigpt4.evaluation.failures.rules import Failure, find_failures
from minigpt4.evaluation.failures.tasks import task_called


@dataclass(frozen=True)
class AskedAnswer:
    """One answer of one checkpoint."""

    checkpoint: str
    task: str
    image_id: str
    image: str
    """File."""

    instruction: str
    """As a person reads it, without marks for the image."""

    text: str
    ended: bool | None
    """Whether the model ended it itself; see `find_failures`."""

    failures: tuple[Failure, ...] = ()

    @cached_property
    def key(self) -> str:
        """Of what a person sees: the same for every checkpoint that gives this answer."""
        seen = json.dumps([self.task, self.image_id, self.instruction, self.text])
        return hashlib.sha256(seen.encode()).hexdigest()[:16]

    def by_rules(self) -> "AskedAnswer":
        """The answer with what the rules find."""
        found = find_failures(self.text, task_called(self.task).form, self.ended)
        return replace(self, failures=tuple(found))

    def by_hand(self, kinds: Sequence[str]) -> "AskedAnswer":
        """The answer with a person's verdict in place of all others."""
        return replace(self, failures=tuple(Failure(kind, "seen by a person") for kind in kinds))

    def and_failures(self, more: Sequence[Failure]) -> "AskedAnswer":
        """The answer with further failures."""
        return replace(self, failures=(*self.failures, *more))


def write_answers(file: Path, answers: Sequence[AskedAnswer]) -> None:
    """Write answers, without their failures, as JSON; ConfigError if the disk refuses."""
    entries = [{key: value for key, value in asdict(one).items() if key != "failures"} for one in answers]
    write_whole(file, as_json(entries))


def read_answers(file: Path) -> list[AskedAnswer]:
    """The answers of a file of `write_answers`; ConfigError if it is none."""
    try:
        return [AskedAnswer(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; eval_failure_rate.py writes it") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: not a file of answers: {error}") from error
