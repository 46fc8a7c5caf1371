"""The step `export`: what is left, as the folder that stage 2 trains on. Nothing is drawn, and ids stay."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from typing import Any

from minigpt4.common.curation_schema import ExportConfig
from minigpt4.common.errors import SampleError, errors_as
from minigpt4.common.utils import DISTRIBUTION, as_json, replacing, write_whole
from minigpt4.curation.records import FILES, OPTION, PACKAGES, CurationFolder, Record, dropped, text_of
from minigpt4.curation.review import EDIT, REJECT, VerdictFile
from minigpt4.evaluation.report import Table

FOLDER = "cc_sbu_align"
PAPER = {"images": 5000, "kept": 3500}
"""Section 3.1 of the MiniGPT-4 paper: about."""


def decide(record: Record, verdicts: Mapping[str, Record], settings: ExportConfig) -> tuple[str, Any]:
    """The text of a record, or in its place why it leaves; of several reviewers half are enough to reject."""
    if "dropped" in record:
        return "", record["dropped"]
    against = [own for own in verdicts.values() if own["verdict"] == REJECT]
    if against and 2 * len(against) >= len(verdicts):
        reasons = dict.fromkeys(reason for own in against for reason in own.get("reasons") or [])
        return "", dropped("review", "rejected", ", ".join(reasons) or "no reason given")
    edits = [own["text"] for own in verdicts.values() if own["verdict"] == EDIT and (own.get("text") or "").strip()]
    if not verdicts and record.get("review") and settings.review_pile == "leave out":
        pile = record["review"][0]
        return "", dropped("review", f"waits: {pile['rule']}", pile["evidence"])
    return (edits[-1] if edits else text_of(record)), None


def export(folder: CurationFolder, settings: ExportConfig, seed: int) -> dict[str, Any]:
    """Write `cc_sbu_align/`; returns the content of its `curation.json`.

    SampleError, and nothing is written, where an image is missing or not as it was selected.
    """
    records, reviews = folder.read("filter"), VerdictFile(folder.file("review"))
    reviews.refresh()
    decided = [(one, *decide(one, reviews.latest.get(one["id"], {}), settings)) for one in records]
    kept = [(one, text) for one, text, why in decided if why is None]
    faults = [fault for one, _ in kept if (fault := _fault(folder, one))]
    if faults:
        raise SampleError(f"{len(faults)} images have changed since `select`, such as {faults[0]}; run it again")
    target = folder.path / FOLDER
    with errors_as(SampleError, f"{OPTION}: {target} cannot be written"):
        (target / "image").mkdir(parents=True, exist_ok=True)
        names = {f"{one['id']}.jpg": one for one, _ in kept}
        for file in (target / "image").iterdir():  # of an export before, or what a kill left
            if file.name not in names:
                file.unlink()
        for name, one in names.items():
            file = target / "image" / name
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != one["sha256"]:
                with replacing(file) as part:
                    part.write_bytes(folder.image(one).read_bytes())
    annotations = as_json({"annotations": [{"image_id": one["id"], "caption": text} for one, text in kept]})
    removed = [[one["id"], why["step"], why["rule"], why["evidence"], text_of(one)] for one, _, why in decided if why]
    facts = _facts(folder, settings, decided, len(reviews.latest)) | {"seed": seed}
    facts["sha256"]["filter_cap.json"] = hashlib.sha256(annotations.encode()).hexdigest()
    table = Table(["image_id", "step", "rule", "evidence", "text"], removed)
    texts = {"filter_cap.json": annotations, "removed.csv": table.csv(), "curation.json": as_json(facts)}
    for name, text in texts.items():
        write_whole(target / name, text, OPTION)
    return facts


def _fault(folder: CurationFolder, record: Record) -> str:
    file = folder.image(record)
    if not file.is_file():
        return f"{file}, which is missing"
    same = hashlib.sha256(file.read_bytes()).hexdigest() == record.get("sha256")
    return "" if same else f"{file}, whose content changed"


def _facts(folder: CurationFolder, settings: ExportConfig, decided: Sequence[Any], reviewed: int) -> dict[str, Any]:
    """The content of `curation.json`."""
    left = Counter(f"{why['step']}: {why['rule']}" for _, _, why in decided if why is not None)
    names = {DISTRIBUTION, "openai", *(name.replace("_", "-") for name in PACKAGES)}
    steps = [step for step in FILES if folder.file(step).is_file()]
    return {
        "selected": len(decided),
        "records": sum(why is None for _, _, why in decided),
        "removed": dict(sorted(left.items())),
        "edited": sum(why is None and text != text_of(one) for one, text, why in decided),
        "reviewed": reviewed,
        "licence": settings.licence,
        "made_from": {step: folder.made_from(step) for step in steps if step != "review"},
        "sha256": {FILES[step]: folder.sha256(step) for step in steps},
        "versions": dict(sorted((own.name, own.version) for own in distributions() if own.name.lower() in names)),
    }
