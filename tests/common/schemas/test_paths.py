"""Paths: names that no file can have, shards in braces, and what does not exist, listed by key."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from minigpt4.common.binding import PathTo, bind, expand_braces, missing_paths, require_paths
from minigpt4.common.errors import ConfigError


@dataclass
class Data:
    storage: Annotated[str | None, PathTo("data", training=True)] = None


@dataclass
class Section:
    weights: Annotated[str | None, PathTo("file")] = None
    llm: Annotated[str | None, PathTo("dir")] = None
    output: Annotated[str, PathTo("dir", later=True)] = "no/such/output"
    resume: Annotated[str | None, PathTo("checkpoint")] = None
    note: str = "no/such/note"
    evaluate: bool = False
    data: Data = field(default_factory=Data)


@pytest.fixture(autouse=True)
def _in_a_folder_with_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").mkdir()
    for name in ("w.pth", "0.tar", "1.tar"):
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        (Section(), []),
        (Section(weights="w.pth", llm="llm", resume="auto"), []),
        (Section(weights="https://example.org/w.pth"), []),
        (Section(data=Data("{0..1}.tar")), []),
        (Section(data=Data("llm")), []),
        (Section(data=Data("pipe:cat nowhere.tar")), []),
        (Section(data=Data("s3://bucket/{0..9}.tar")), []),
        (Section(data=Data("gone"), evaluate=True), []),
        (Section(weights="gone.pth"), [("run.weights", "gone.pth")]),
        (Section(weights="llm"), [("run.weights", "llm")]),
        (Section(llm="w.pth"), [("run.llm", "w.pth")]),
        (Section(data=Data("{0..7}.tar")), [("run.data.storage", "7.tar")]),
    ],
)
def test_missing_paths_are_those_that_are_not_here_and_not_remote(section, missing):
    assert missing_paths({"run": section}) == missing


def test_missing_paths_of_all_sections_stand_in_one_error():
    require_paths({"model": Section(weights="w.pth")}, "user.yaml")
    with pytest.raises(ConfigError, match=r"user\.yaml") as error:
        require_paths({"model": Section(weights="a.pth"), "datasets.x": Section(data=Data("b"))}, "user.yaml")
    assert "model.weights: a.pth does not exist; set it" in str(error.value)
    assert "datasets.x.data.storage: b does not exist" in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..2000000000}.tar",
        "http://x/{0..2000000000}.tar",
        "{0..99999}{0..99999}.tar",
        "{{0..9999},{0..9999}}{0..9999}.tar",
        "{{0..999999}{0..999999},x}{a,b}",
        "{a,b}" * 40,
        "{" + "0" * 5000 + "..9}.tar",
        "{" + "0" * 4000 + "1..900000}.tar",
        "{a," * 900 + "b" + "}" * 900,
    ],
)
def test_braces_that_stand_for_too_much_are_refused_before_they_are_expanded(pattern):
    with pytest.raises(ConfigError, match=r"data\.storage"):
        bind(Section, {"data": {"storage": pattern}}, section="model", source="user.yaml")


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{08..10..2}", ["08", "10"]),
        ("{a,b{1..2},}x", ["ax", "b1x", "b2x", "x"]),
        ("{z..y}", ["z", "y"]),
        ("a{b}c", ["a{b}c"]),
        (r"\{1..3\}", ["{1..3}"]),
        ("{0..9..0}", list("0123456789")),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(pattern, expanded):
    assert expand_braces(pattern) == expanded


def test_published_numbers_of_shards_are_not_too_many():
    assert len(expand_braces("data/{cc/{00000..01255},laion/{00000..10488}}.tar")) == 11745


def test_tilde_is_the_home_directory_in_path_fields_only(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    values = {"llm": "~/llm", "weights": "https://x/~me/y", "note": "~/note", "data": {"storage": "~/{0..9}.tar"}}
    section = bind(Section, values, section="model", source="a.yaml")
    expected = Data("/users/me/{0..9}.tar")
    assert section == Section(llm="/users/me/llm", weights="https://x/~me/y", note="~/note", data=expected)


@pytest.mark.parametrize("name", ["~nouser/x", "a\0b", "\ud800"])
@pytest.mark.parametrize("key", ["output", "weights"])
def test_name_that_no_file_can_have_is_refused(key, name):
    with pytest.raises(ConfigError, match=f"model.{key}: "):
        bind(Section, {key: name}, section="model", source="user.yaml")
