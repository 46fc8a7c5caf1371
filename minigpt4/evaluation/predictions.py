"""Captions on disk, written batch by batch, so that a killed evaluation goes on with what is there.

    DIR/predictions/<key>/made_from.json   what the captions were made from; the key is its hash
    DIR/predictions/<key>/rank<N>.jsonl    {"batch": 7, "captions": {"1000092795": "Two men ..."}, "ended": [true]}

Captions made in another way have another key, so they are neither mixed up nor overwritten. A batch is one line: it
is there as a whole or made again. `ended` says of each caption, in their order, whether the model ended it itself
and not the token limit; older files lack it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.json_lines import JsonLines
from minigpt4.common.text import escaped
from minigpt4.models.generation import Answer

FOLDER = "predictions"


class Predictions:
    """Captions of one checkpoint.

    Args:
        folder: of the evaluation.
        made_from: everything that the captions depend on, plain types.
        batches: image ids of every batch.
        rank: of this process; each writes a file of its own.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any], batches: Sequence[Sequence[str]], rank: int) -> None:
        text = escaped(json.dumps(made_from, indent=1, sort_keys=True, ensure_ascii=False))
        self.folder = folder / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._batches = batches
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                (self.folder / "made_from.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--save_path: cannot write to {self.folder}: {error.strerror}") from error
        self._own = JsonLines(self.folder / f"rank{rank}.jsonl")
        self._own.keep(self._is_batch)
        self.done: dict[int, dict[str, Answer]] = {}
        for file in sorted(self.folder.glob("rank*.jsonl")):
            self.done |= {r["batch"]: _answers(r) for r in JsonLines(file).read() if self._is_batch(r)}

    def add(self, batch: int, answers: Mapping[str, Answer]) -> None:
        """Keep the captions of a batch, by image id."""
        self.done[batch] = dict(answers)
        captions = {image_id: answer.text for image_id, answer in answers.items()}
        self._own.append({"batch": batch, "captions": captions, "ended": [one.ended for one in answers.values()]})

    def _is_batch(self, record: Mapping[str, Any]) -> bool:
        number, captions = record.get("batch"), record.get("captions")
        fits = isinstance(number, int) and 0 <= number < len(self._batches) and isinstance(captions, dict)
        return fits and list(captions) == list(self._batches[number])


def _answers(record: Mapping[str, Any]) -> dict[str, Answer]:
    captions, ended = record["captions"], record.get("ended")
    if not isinstance(ended, list) or len(ended) != len(captions):
        ended = [None] * len(captions)
    return {image_id: Answer(text, end) for (image_id, text), end in zip(captions.items(), ended, strict=True)}
