"""The checkpoints of an evaluation: what they are called, which files they are, and what their cards say."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, WeightsError, errors_as
from minigpt4.common.run_checkpoints import file_sha256, read_card

log = logging.getLogger(__name__)

EPOCH = re.compile(r"checkpoint_(\d+)")
CARD_FACTS = (
    "arch",
    "model_type",
    "llm",
    "llm_fingerprint",
    "vision",
    "vision_fingerprints",
    "epoch",
    "iteration",
    "valid_loss",
    "job_name",
    "run_started",
    "trained",
    "versions",
)
"""What a report repeats of a card; the rest is the configuration of the training."""


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint to evaluate."""

    name: str
    """In tables, such as `epoch 3`."""

    path: Path
    sha256: str
    card: dict[str, Any] | None
    """Facts of the card beside the file; None without one that fits the file."""

    @property
    def file_name(self) -> str:
        """The name as part of a file name, `epoch_3`."""
        return _file_name(self.name)


@errors_as(ConfigError, "--ckpt")
def read_checkpoint_list(values: Sequence[str]) -> list[NamedCheckpoint]:
    """Checkpoints given as PATH or NAME=PATH, in their order.

    Raises:
        WeightsError: a file is not there.
        ConfigError: two have the same name.
    """
    with errors_as(WeightsError, "--ckpt"):
        pairs = [_name_and_path(value) for value in values]
        lost = [path for _, path in pairs if not path.is_file()]
    if lost:
        raise WeightsError(f"--ckpt: there is no file {lost[0]}")
    for number, (name, _) in enumerate(pairs):
        same = [other for other, _ in pairs[:number] if _file_name(other) == _file_name(name)]
        if same:
            raise ConfigError(f"--ckpt: {same[0]!r} and {name!r} would share their files; name them: NAME=PATH")
    return [_read(name, path) for name, path in pairs]


def _name_and_path(value: str) -> tuple[str, Path]:
    name, mark, path = value.partition("=")
    if mark and name.strip() and path and not Path(value).is_file():
        return name.strip(), Path(path).expanduser()
    path = Path(value).expanduser()
    epoch = EPOCH.fullmatch(path.stem)
    return (f"epoch {epoch[1]}" if epoch else path.stem), path


def _read(name: str, path: Path) -> NamedCheckpoint:
    with errors_as(WeightsError, f"--ckpt: {path}"):
        digest = file_sha256(path)
    card = read_card(path)
    if card is not None and card["sha256"] != digest:
        log.warning("%s is not the file that its card describes; the report shows no card", path)
        card = None
    facts = None if card is None else {key: card[key] for key in CARD_FACTS if key in card}
    return NamedCheckpoint(name, path, digest, facts)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
