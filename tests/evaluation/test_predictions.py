"""Captions on disk: whole batches or none, of these batches and this origin alone."""

import json

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.evaluation.generate import Predictions
from minigpt4.models.generation import Answer

BATCHES = [["1", "2"], ["3"]]
MADE_FROM = {"checkpoint": "00", "prompt": "What is it?"}


def _open(folder, rank=0, **changes) -> Predictions:
    return Predictions(folder, MADE_FROM | changes, BATCHES, rank)


def _said(**texts: str) -> dict[str, Answer]:
    return {image_id.removeprefix("i"): Answer(text, True) for image_id, text in texts.items()}


def test_captions_of_all_processes_are_found_again(tmp_path):
    _open(tmp_path).add(0, _said(i1="a", i2=""))
    _open(tmp_path, rank=1).add(1, _said(i3="ü"))
    assert _open(tmp_path).done == {0: _said(i1="a", i2=""), 1: _said(i3="ü")}


def test_captions_of_another_origin_are_not(tmp_path):
    _open(tmp_path).add(1, _said(i3="a"))
    assert _open(tmp_path, prompt="Where?").done == {}
    assert _open(tmp_path).done == {1: _said(i3="a")}


def test_how_captions_ended_is_kept_and_older_files_leave_it_open(tmp_path):
    answers = {"1": Answer("a", False), "2": Answer("", True)}
    predictions = _open(tmp_path)
    predictions.add(0, answers)
    file = predictions.folder / "rank0.jsonl"
    assert json.loads(file.read_text()) == {"batch": 0, "captions": {"1": "a", "2": ""}, "ended": [False, True]}
    with file.open("a") as lines:
        lines.write('{"batch": 1, "captions": {"3": "c"}}\n')
    assert _open(tmp_path).done == {0: answers, 1: {"3": Answer("c", None)}}


def test_folder_says_what_its_captions_were_made_from(tmp_path):
    assert json.loads((_open(tmp_path).folder / "made_from.json").read_text()) == MADE_FROM


@pytest.mark.parametrize(
    "line",
    [
        '{"batch": 1, "captions": {"3": "a',
        '{"batch": 1, "captions": {"4": "a"}}',
        '{"batch": 2, "captions": {"3": "a"}}',
        '{"batch": -1, "captions": {"3": "a"}}',
        '{"batch": 1, "captions": ["a"]}',
        "[1]",
    ],
)
def test_line_that_is_no_whole_batch_is_dropped(tmp_path, line):
    predictions = _open(tmp_path)
    predictions.add(0, _said(i1="a", i2="b"))
    file = predictions.folder / "rank0.jsonl"
    whole = file.read_text()
    file.write_text(whole + line)
    again = _open(tmp_path)
    assert list(again.done) == [0]
    assert file.read_text() == whole


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--save_path: cannot write to"):
        _open(tmp_path / "file")
