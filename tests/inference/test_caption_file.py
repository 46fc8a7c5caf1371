"""Files of captions: what a second run keeps, drops and refuses."""

import json
import os

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.inference.captioning import CaptionFile

MADE_FROM = {"checkpoint": "ab", "prompt": "What?", "decoding": {"num_beams": 1}, "stop": ["###"]}


def _line(name, **fields):
    return {"image_id": name, "image": f"{name}.jpg", **(fields or {"caption": f"A {name}."})}


@pytest.fixture
def open_file(tmp_path):
    """`open_file(...)`: the file as a run finds it, and the images that are done."""

    def open_file(retry_failed=False, **changes):
        file = CaptionFile(tmp_path / "new" / "captions.jsonl")
        return file, list(file.start(MADE_FROM | changes, {"batch_size": 8}, retry_failed=retry_failed))

    return open_file


def test_lines_are_there_as_soon_as_they_are_added_beside_what_they_were_made_from(open_file):
    file, done = open_file()
    assert done == []
    file.add([_line("a"), _line("ü", error="ü.jpg: not an image")])
    assert file.path.read_text().splitlines() == [
        '{"image_id": "a", "image": "a.jpg", "caption": "A a."}',
        '{"image_id": "ü", "image": "ü.jpg", "error": "ü.jpg: not an image"}',
    ]
    assert json.loads(file.provenance_file.read_text()) == MADE_FROM | {"about": {"batch_size": 8}}
    assert file.provenance_file.name == "captions.made_from.json"


def test_second_run_keeps_all_lines_failed_ones_too(open_file):
    file, _ = open_file()
    file.add([_line("a"), _line("b", error="b")])
    before = file.path.read_bytes()
    assert open_file()[1] == ["a.jpg", "b.jpg"]
    assert file.path.read_bytes() == before


def test_retry_drops_the_failed_lines(open_file):
    file, _ = open_file()
    file.add([_line("a"), _line("b", error="b")])
    assert open_file(retry_failed=True)[1] == ["a.jpg"]
    assert [line["image_id"] for line in map(json.loads, file.path.read_text().splitlines())] == ["a"]


@pytest.mark.parametrize(
    "torn", ['{"image_id": "b", "ima', "[1]\n", '{"image_id": "b", "image": "b.jpg"}\n', json.dumps(_line("a"))]
)
def test_what_is_no_whole_line_or_comes_twice_is_dropped_and_the_next_line_stands_alone(open_file, torn):
    file, _ = open_file()
    file.add([_line("a")])
    with file.path.open("a") as text:
        text.write(torn)
    file, done = open_file()
    assert done == ["a.jpg"]
    file.add([_line("b")])
    assert file.path.read_text() == "".join(json.dumps(_line(name)) + "\n" for name in "ab")


def test_last_line_that_lost_only_its_end_is_kept(open_file):
    file, _ = open_file()
    file.path.write_text(json.dumps(_line("a")))
    file, done = open_file()
    file.add([_line("b")])
    assert done == ["a.jpg"]
    assert len(file.path.read_text().splitlines()) == 2


def test_file_of_another_provenance_is_refused_with_what_differs_and_stays(open_file):
    file, _ = open_file()
    file.add([_line("a")])
    before = file.path.read_bytes(), file.provenance_file.read_bytes()
    with pytest.raises(ConfigError, match=r'(?s)prompt: "What\?" then, "Where\?" now.*num_beams: 1 then, 5 now'):
        open_file(prompt="Where?", decoding={"num_beams": 5})
    assert (file.path.read_bytes(), file.provenance_file.read_bytes()) == before


@pytest.mark.parametrize("content", [None, "", "[1]", "7", "[" * 100_000])
def test_file_of_unknown_provenance_is_refused(open_file, content):
    file, _ = open_file()
    file.add([_line("a")])
    file.provenance_file.unlink()
    if content is not None:
        file.provenance_file.write_text(content)
    with pytest.raises(ConfigError, match=r"captions\.made_from\.json beside it.*cannot be read"):
        open_file()


def test_deleted_file_is_begun_again_whatever_it_was_made_from(open_file):
    file, _ = open_file()
    file.add([_line("a")])
    file.path.unlink()
    assert open_file(prompt="Where?")[1] == []
    assert json.loads(file.provenance_file.read_text())["prompt"] == "Where?"


def test_file_name_that_is_not_utf8_survives(open_file):
    file, _ = open_file()
    file.add([_line("\udcfc")])
    before = file.path.read_bytes()
    assert open_file()[1] == ["\udcfc.jpg"]
    assert file.path.read_bytes() == before


def test_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output: cannot"):
        CaptionFile(tmp_path / "file" / "captions.jsonl").start(MADE_FROM, {}, retry_failed=False)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match="--output: cannot read .*folder.jsonl"):
        CaptionFile(tmp_path / "folder.jsonl").start(MADE_FROM, {}, retry_failed=False)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigError, match=r"--output: .*pipe.jsonl is a pipe"):
        CaptionFile(tmp_path / "pipe.jsonl").start(MADE_FROM, {}, retry_failed=False)
    with pytest.raises(ConfigError, match=r"captions\.json must end in \.jsonl"):
        CaptionFile(tmp_path / "captions.json")
