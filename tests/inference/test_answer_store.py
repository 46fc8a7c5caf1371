"""Answers on disk: what a second run keeps, drops and refuses, in the file of captions and in those of evaluations."""

import json
import os

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.inference.captioning import AnswerStore

MADE_FROM = {"checkpoint": "ab", "prompt": "What?", "decoding": {"num_beams": 1}, "stop": ["###"]}


def _line(name, **fields):
    return {"image_id": name, "image": f"{name}.jpg", **(fields or {"caption": f"A {name}."})}


@pytest.fixture
def open_file(tmp_path):
    """`open_file(...)`: the file as a run finds it, and the images that are done."""

    def open_file(retry_failed=False, **changes):
        file = AnswerStore.captions(tmp_path / "new" / "captions.jsonl")
        return file, list(file.start(MADE_FROM | changes, {"batch_size": 8}, retry_failed=retry_failed))

    return open_file


@pytest.fixture
def predictions(tmp_path):
    """`predictions(rank, **changes)`: the store of a process."""
    return lambda rank=0, **changes: AnswerStore.predictions(tmp_path, MADE_FROM | changes, rank)


def test_lines_are_there_at_once_and_a_second_run_keeps_them_failed_ones_too(open_file):
    file, done = open_file()
    assert done == []
    file.add([_line("a"), _line("ü", error="ü.jpg: not an image"), _line("\udcfc", caption="x", ended=True)])
    before = file.path.read_bytes()
    assert before.decode().splitlines() == [
        '{"image_id": "a", "image": "a.jpg", "caption": "A a."}',
        '{"image_id": "ü", "image": "ü.jpg", "error": "ü.jpg: not an image"}',
        '{"image_id": "\\udcfc", "image": "\\udcfc.jpg", "caption": "x"}',
    ]
    made_from = json.loads((file.path.parent / "captions.made_from.json").read_text())
    assert made_from == MADE_FROM | {"about": {"batch_size": 8}}
    assert open_file()[1] == ["a.jpg", "ü.jpg", "\udcfc.jpg"]
    assert file.path.read_bytes() == before
    assert open_file(retry_failed=True)[1] == ["a.jpg", "\udcfc.jpg"]


@pytest.mark.parametrize(
    "torn", ['{"image_id": "b", "ima', "[1]\n", '{"image_id": "b", "image": "b.jpg"}\n', json.dumps(_line("a"))]
)
def test_what_is_no_whole_line_or_comes_twice_is_dropped_and_the_next_line_stands_alone(open_file, torn):
    file, _ = open_file()
    file.add([_line("a")])
    with file.path.open("a") as text:
        text.write(torn)
    assert open_file()[1] == ["a.jpg"]
    file.add([_line("b")])
    assert file.path.read_text() == "".join(json.dumps(_line(name)) + "\n" for name in "ab")
    file.path.write_text(json.dumps(_line("a")))  # lost only its line end
    assert open_file()[1] == ["a.jpg"]
    assert file.path.read_text().endswith("}\n")


def test_file_that_was_deleted_is_begun_again_with_another_prompt(open_file):
    file, _ = open_file()
    file.add([_line("a")])
    file.path.unlink()
    assert open_file(prompt="Where?")[1] == []
    assert json.loads(file.provenance_file.read_text())["prompt"] == "Where?"


def test_file_of_unknown_provenance_is_refused(open_file):
    file, _ = open_file()
    file.add([_line("a")])
    file.provenance_file.unlink()
    for content in (None, "", "[1]", "[" * 100_000):
        if content is not None:
            file.provenance_file.write_text(content)
        with pytest.raises(ConfigError, match=r"captions\.made_from\.json.*cannot be read"):
            open_file()


def test_place_that_cannot_be_written_to_is_named(tmp_path, predictions):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("file/captions.jsonl", "folder.jsonl", "pipe.jsonl"):
        with pytest.raises(ConfigError, match=rf"--output: .*{name}|--output: cannot write"):
            AnswerStore.captions(tmp_path / name).start(MADE_FROM, {}, retry_failed=False)
    with pytest.raises(ConfigError, match=r"captions\.json must end in \.jsonl"):
        AnswerStore.captions(tmp_path / "captions.json")
    (tmp_path / "predictions").write_text("")
    with pytest.raises(ConfigError, match="--save_path: cannot write"):
        predictions()


def test_answers_of_all_processes_are_found_again_and_those_of_another_provenance_are_not(predictions):
    predictions().add([{"image_id": "1", "image": "1.jpg", "caption": "a", "ended": True}])
    predictions(rank=1).add([{"image_id": "2", "caption": "ü", "ended": False}])
    store = predictions()
    assert store.lines("rank*.jsonl") == {
        "1": {"image_id": "1", "caption": "a", "ended": True},
        "2": {"image_id": "2", "caption": "ü", "ended": False},
    }
    assert predictions(prompt="Where?").lines("rank*.jsonl") == {}
    assert json.loads(store.provenance_file.read_text()) == MADE_FROM
