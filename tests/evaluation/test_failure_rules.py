"""Rules of failures, each by itself and all on labelled texts; and replies of a judge."""

import json
from pathlib import Path

import pytest

from minigpt4.evaluation.failure_rate import read_reply
from minigpt4.evaluation.failure_rules import RULED_KINDS, TASKS, find_failures
from minigpt4.evaluation.report import Table

TESTS = Path(__file__).parents[1]
LABELS = [json.loads(line) for line in (TESTS / "data" / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
GOOD = (
    "The image shows a kitchen with a round table. A loaf of bread and a jar of honey stand on a checked cloth, and a "
    "grey cat sits on one of the chairs."
)
VERSE = "The river runs beneath the bridge,\nthe evening paints it gold,\nand on the bank an old man sits\n"
AGAIN = "The old man sits on the bank of the river. "
PARTS = ["there is a car on the left", "there is a man on the right", "there is a dog in the street"]
PHRASES = ", ".join(PARTS[n % 3] + (" too" if place % 2 else "") for place, n in enumerate((0, 1, 2, 1, 0, 2, 2, 0, 1)))
VERY = "The tree on the hill is {}old, and a swing hangs from a branch."
GERMAN = "Das Bild zeigt einen Mann, der mit seinem Hund durch einen Park geht und einen Ball in der Hand trägt."
SIGN = 'The sign above the door of the old house at the corner reads "停车场停车场停车场停车场".'


def _kinds(text: str, form: str, ended: bool | None) -> dict[str, str]:
    return {failure.kind: failure.evidence for failure in find_failures(text, form, ended)}


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("prose", GOOD),
        ("prose", GOOD[:-1]),
        ("prose", VERY.format("very " * 3)),
        ("prose", SIGN),
        ("verse", AGAIN + GOOD + " " + AGAIN),
        ("verse", VERSE + "and sings, and sings, and sings the old refrain.\n" * 2),
        ("verse", "And snow on the fence posts\na red cart left in the yard"),
    ],
)
def test_good_answer_has_no_failure(form, text):
    assert _kinds(text, form, True) == _kinds(text, form, None) == {}


@pytest.mark.parametrize(
    ("text", "form", "ended", "kind", "evidence"),
    [
        *((text, "prose", False, "empty", "no word") for text in ("", " \n", "...", "- -", "!?")),
        (GOOD, "prose", False, "cut off", "after a whole sentence"),
        (GOOD[:-10], "prose", False, "cut off", "in mid-sentence"),
        (GOOD[:-7] + "the", "prose", False, "cut off", "in mid-sentence"),  # and no fragment, too
        (VERY.format("very " * 4), "prose", True, "repetition", "4 times in a row"),
        ("There is a tree " + "and a red car " * 9 + "in the street.", "prose", True, "repetition", "“and a red car”"),
        (AGAIN + GOOD + " " + AGAIN, "prose", True, "repetition", "2 times the sentence"),
        (VERSE * 3, "verse", True, "repetition", "of the 4-word passages"),
        (VERSE + "the sea, the sea, " * 5 + "and the shore.", "verse", True, "repetition", "in a row"),
        (PHRASES + ".", "prose", True, "repetition", "4-word passages came before"),
        ("a dog on a couch", "prose", True, "fragment", "5 words"),
        (GOOD + " ###", "prose", True, "fragment", "debris of a template: '###'"),
        (GOOD + " Human: What else?", "prose", True, "fragment", "debris of a template: 'Human:'"),
        ("1. A red barn behind the fence of a farm.\n2. A tractor.\n3.", "prose", True, "fragment", "a bullet without"),
        ("and then " + GOOD[0].lower() + GOOD[1:], "prose", True, "fragment", "begins in mid-sentence: “and then the"),
        (", " + GOOD, "prose", True, "fragment", "begins with ','"),
        (GOOD[:-7] + "the", "prose", True, "fragment", "ends in mid-sentence: “..."),
        (GOOD[:-1] + ",", "prose", True, "fragment", "ends in mid-sentence"),
        (GERMAN, "prose", True, "not English", "English function words"),
        ("图中有一只猫坐在窗台上。", "prose", True, "not English", "11 of 11 letters are not Latin"),
    ],
)
def test_failure_is_named_by_what_shows_it(text, form, ended, kind, evidence):
    found = _kinds(text, form, ended)
    assert list(found) == [kind]
    assert evidence in found[kind]


# Labelled texts


def _row(kind: str, pairs: list[tuple[bool, bool]]) -> list[str]:
    labelled, found = (sum(pair[side] for pair in pairs) for side in (0, 1))
    both = sum(wanted and got for wanted, got in pairs)
    return [kind, str(labelled), str(found), f"{both / found:.2f}", f"{both / labelled:.2f}"]


@pytest.mark.parametrize(("part", "texts", "errors"), [("tuning", 66, 1), ("held out", 50, 6)])
def test_rules_agree_with_labels_as_the_docs_say(part, texts, errors):
    own = [label for label in LABELS if label["part"] == part]
    pairs = [(set(one["kinds"]), set(_kinds(one["text"], TASKS[one["task"]].form, one["ended"]))) for one in own]
    assert len(own) == texts
    assert sum(wanted != found for wanted, found in pairs) == errors
    rows = [_row(kind, [(kind in wanted, kind in found) for wanted, found in pairs]) for kind in RULED_KINDS]
    rows.append(_row("any failure", [(bool(wanted), bool(found)) for wanted, found in pairs]))
    table = Table(["kind", "labelled", "found", "precision", "recall"], rows).markdown()
    assert table in (TESTS.parent / "docs" / "failure_rate.md").read_text(encoding="utf-8")


# Replies of a judge


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("IMAGE: yes - a dog\nINSTRUCTION: yes - detailed", []),
        ("**IMAGE:** no - it is a cat.\nINSTRUCTION: yes", [("off the image", "the judge: it is a cat.")]),
        ("1. **IMAGE**: Yes.\n2. **INSTRUCTION**: No, prose.", [("off the instruction", "the judge: prose.")]),
        (
            "Let me see.\n\nimage: NO\n\ninstruction - no",
            [(f"off the {what}", "the judge: no reason given") for what in ("image", "instruction")],
        ),
        *((reply, None) for reply in ("", "yes", "IMAGE: yes", "IMAGE: maybe\nINSTRUCTION: yes", "IMAGE: yesterday")),
    ],
)
def test_reply_is_read_in_the_forms_that_models_use_or_not_at_all(reply, found):
    failures = read_reply(reply)
    assert found == (failures if failures is None else [(one.kind, one.evidence) for one in failures])
