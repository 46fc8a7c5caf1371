"""Paths that do not exist are listed by key before anything loads."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from minigpt4.common.binding import bind, expand_braces, expand_home, missing_paths, require_paths
from minigpt4.common.errors import ConfigError


@dataclass
class Data:
    storage: str | None = field(default=None, metadata={"path": "data"})


@dataclass
class Section:
    weights: str | None = field(default=None, metadata={"path": "file"})
    llm: str | None = field(default=None, metadata={"path": "dir"})
    output: str = field(default="no/such/output", metadata={"path": "later"})
    note: str = "no/such/note"
    data: Data = field(default_factory=Data)


@pytest.fixture(autouse=True)
def _in_a_folder_with_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").mkdir()
    for name in ("w.pth", "0.tar", "1.tar"):
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    "section",
    [
        Section(),
        Section(weights="w.pth", llm="llm"),
        Section(weights="https://example.org/w.pth"),
        Section(data=Data("{0..1}.tar")),
        Section(data=Data("llm")),
        Section(data=Data("pipe:cat nowhere.tar")),
        Section(data=Data("s3://bucket/{0..9}.tar")),
    ],
)
def test_what_exists_or_is_remote_is_not_missing(section):
    assert missing_paths({"model": section}) == []


@pytest.mark.parametrize(
    ("section", "key", "path"),
    [
        (Section(weights="gone.pth"), "model.weights", "gone.pth"),
        (Section(weights="llm"), "model.weights", "llm"),
        (Section(llm="w.pth"), "model.llm", "w.pth"),
        (Section(data=Data("{0..7}.tar")), "model.data.storage", "7.tar"),
    ],
)
def test_missing_path_is_listed_with_its_key(section, key, path):
    assert missing_paths({"model": section}) == [(key, path)]


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..2000000000}.tar",
        "http://x/{0..2000000000}.tar",
        "{0..99999}{0..99999}.tar",
        "{{0..9999},{0..9999}}{0..9999}.tar",
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


def test_missing_paths_of_all_sections_stand_in_one_error():
    sections = {"model": Section(weights="a.pth"), "datasets.x": Section(data=Data("b"))}
    with pytest.raises(ConfigError) as error:
        require_paths(sections, "user.yaml")
    assert "model.weights: a.pth does not exist" in str(error.value)
    assert "datasets.x.data.storage: b does not exist" in str(error.value)
    assert "--options model.weights=..." in str(error.value)


def test_complete_configuration_passes():
    require_paths({"model": Section(weights="w.pth")}, "user.yaml")


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~/vicuna-7b", "/users/me/vicuna-7b"),
        (Path("~/x.pth"), Path("/users/me/x.pth")),
        ("~/shards/{00..09}.tar", "/users/me/shards/{00..09}.tar"),
        ("https://example.org/~me/x.pth", "https://example.org/~me/x.pth"),
        ("weights/x.pth", "weights/x.pth"),
    ],
)
def test_tilde_is_the_home_directory(monkeypatch, path, expanded):
    monkeypatch.setenv("HOME", "/users/me")
    assert expand_home(path) == expanded


def test_tilde_is_expanded_in_path_fields_only(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    values = {"llm": "~/llm", "output": "~/out", "note": "~/note", "data": {"storage": "~/d"}}
    section = bind(Section, values, section="model", source="a.yaml")
    assert section == Section(llm="/users/me/llm", output="/users/me/out", note="~/note", data=Data("/users/me/d"))
