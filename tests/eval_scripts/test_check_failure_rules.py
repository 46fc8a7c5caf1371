"""The rules of failures on labelled texts."""

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LABELS = [json.loads(line) for line in (TESTS / "data" / "failures.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def script(command):
    return command("check_failure_rules")


def test_labels_are_many_and_of_every_kind():
    assert len(LABELS) >= 80
    kinds = [kind for label in LABELS for kind in label["kinds"]]
    assert min(kinds.count(kind) for kind in set(kinds)) >= 8
    assert len(set(kinds)) == 5
    assert sum(not label["kinds"] for label in LABELS) >= 30


@pytest.mark.parametrize(("part", "errors"), [("tuning", 1), ("held out", 6)])
def test_rules_agree_with_people_but_for_the_errors_that_the_docs_list(script, part, errors):
    checked = [script.check(label) for label in LABELS if label["part"] == part]
    assert sum(one.found != one.wanted for one in checked) == errors
    (row,) = [row for row in script.agreement(checked).rows if row[0] == script.ANY]
    assert float(row[3]) >= 0.9
    assert float(row[4]) >= 0.85


def test_docs_state_the_measured_agreement(script, capsys):
    assert script.main([]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    docs = (TESTS.parent / "docs" / "failure_rate.md").read_text(encoding="utf-8")
    assert [line for line in tables if line not in docs] == []


def test_line_that_is_no_label_is_named(script, tmp_path, capsys):
    file = tmp_path / "labels.jsonl"
    file.write_text('{"part": "a", "task": "poem", "ended": true, "kinds": ["dull"], "text": "x"}\n')
    assert script.main([str(file)]) == 2
    assert f"{file}:1: kinds: dull; known: empty" in capsys.readouterr().err
    file.write_text('{"kinds": []}\n')
    assert script.main([str(file)]) == 2
    assert f"{file}:1: not a label" in capsys.readouterr().err
