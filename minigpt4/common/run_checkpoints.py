"""Checkpoints of a run on disk: written so that a kill at any moment leaves whole files only.

A checkpoint is `NAME.pth` in the published layout (`model`, `optimizer`, `scaler`, `config`, `epoch`) plus a
`state` entry for exact resume, plain types and tensors only. Its card `NAME.json`, written last, says what the
file is and holds its sha256: a file without a fitting card was being written when the run died.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.checkpoint import read_weights
from minigpt4.common.errors import WeightsError, errors_as

log = logging.getLogger(__name__)

ITERATION_PATTERN = "checkpoint_iter_*.pth"
TEMPORARY_PATTERN = ".checkpoint_*.tmp"
BEST = "checkpoint_best.pth"
CARD_TYPES = {"run_number": int, "run_started": str, "iteration": int, "best_loss": int | float}
CARD_TYPES |= {"llm_fingerprint": str, "vision_fingerprints": dict}
"""Of what is read from cards; one that has something else there is none."""


def card_path(checkpoint: Path) -> Path:
    """The JSON card beside a checkpoint."""
    return checkpoint.with_suffix(".json")


def save_checkpoint(path: Path, content: Mapping[str, Any], card: Mapping[str, Any]) -> None:
    """Write file and card as temporary files, then rename them, the card last.

    Raises WeightsError if the disk refuses; what was there before, even under this name, stays whole.
    """
    new, new_card = _temporary(path), _temporary(card_path(path))
    try:
        _write(new, lambda file: torch.save(dict(content), file))
        text = json.dumps(
            {**card, "file": path.name, "bytes": new.stat().st_size, "sha256": file_sha256(new)}, indent=2
        )
        _write(new_card, lambda file: file.write(text.encode()))
        card_path(path).unlink(missing_ok=True)  # an older card must not stand beside the new file
        _rename(new, path)
        _rename(new_card, card_path(path))
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        raise WeightsError(
            f"{path}: could not be saved: {_cause(error)}. Earlier checkpoints are untouched; free some space, or make "
            "the disk writable, and go on with run.resume_ckpt_path=auto"
        ) from error
    finally:
        _delete(new)
        _delete(new_card)


def _cause(error: BaseException) -> BaseException:
    """The system's own error; torch hides it behind "unexpected pos 640 vs 534"."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


def drop_leftovers(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it saved."""
    for path in folder.glob(TEMPORARY_PATTERN):
        log.info("%s was left by a save that did not end; it is deleted", path)
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a file that nobody needs, if it is there; a disk that refuses costs a warning."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be deleted (%s)", path, error.strerror)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _rename(old: Path, new: Path) -> None:
    old.replace(new)
    _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some file systems offer no such call."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        log.debug("%s cannot be synchronised", folder)
    finally:
        os.close(descriptor)


def amend_card(path: Path, **facts: Any) -> None:
    """Add what became known later to the card of a checkpoint; WeightsError if the disk refuses."""
    card = read_card(path)
    if card is None:
        return
    new = _temporary(card_path(path))
    try:
        _write(new, lambda file: file.write(json.dumps(card | facts, indent=2).encode()))
        _rename(new, card_path(path))
    except OSError as error:
        raise WeightsError(f"{card_path(path)}: could not be written: {error}") from error
    finally:
        _delete(new)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint; WeightsError if it is broken or is not what its card says."""
    card = read_card(path)
    with errors_as(WeightsError, f"{path}: cannot be read"):
        if card is not None and path.is_file() and card["sha256"] != file_sha256(path):
            card_name = card_path(path).name
            raise WeightsError(f"{path}: its content is not what {card_name} says; take an earlier checkpoint")
    return read_weights(path)


def read_card(path: Path) -> dict[str, Any] | None:
    """The card of a checkpoint, or None if it has none that can be read."""
    try:
        card = json.loads(card_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(card, dict) and isinstance(card.get("sha256"), str)
    fits = whole and all(isinstance(card.get(key), kind | None) for key, kind in CARD_TYPES.items())
    return card if fits else None


def newest_checkpoint(output_dir: Path, job_name: str, folder: str = "*") -> Path | None:
    """The checkpoint of this job in `output_dir/*/` that is furthest on in its latest run, whole by its card.

    Which run is the latest is told by the runs' numbers, for clocks are set back; those of runs before there were
    numbers come first, in the order of their starts. What is broken or half written is passed over, with a warning.
    """
    return _furthest(_numbered(output_dir, f"{folder}/"), job_name)


def best_checkpoint(folder: Path) -> Path | None:
    """What the folder of a run offers to use: `checkpoint_best.pth`, else the checkpoint that is furthest on; whole by
    its card."""
    best = folder / BEST
    return (_furthest([best]) if best.is_file() else None) or _furthest(_numbered(folder))


def _numbered(folder: Path, below: str = "") -> list[Path]:
    return [path for path in folder.glob(f"{below}checkpoint_*.pth") if path.name != BEST]


def _furthest(paths: Iterable[Path], job_name: str | None = None) -> Path | None:
    """Of the whole checkpoints, of one job if it is named, the one that is furthest on in the latest run."""
    found = []
    for path in paths:
        card = read_card(path)
        if card is None:
            log.warning("%s has no card that can be read: half written or not of a run; it is passed over", path)
        elif job_name in (None, card.get("job_name")):
            run = (card.get("run_number") or 0, card.get("run_started") or "")
            found.append((run, card.get("iteration") or 0, path, card["sha256"]))
    for _, _, path, sha256 in sorted(found, reverse=True):
        try:
            if sha256 == file_sha256(path):
                return path
            log.warning("%s is damaged and is passed over", path)
        except OSError as error:
            log.warning("%s cannot be read (%s) and is passed over", path, error.strerror)
    return None


def drop_old(folder: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints of `save_every_iters`, cards first."""
    if keep is None:
        return
    cards = ((read_card(path), path) for path in folder.glob(ITERATION_PATTERN))
    whole = sorted((card.get("iteration") or 0, path) for card, path in cards if card is not None)
    for _, path in whole[:-keep]:
        _delete(card_path(path))
        _delete(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
