"""What commands and runs share: errors, hints, text from outside, files that appear whole, JSON lines, the registry."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.common.errors import ConfigError, RegistryError, SampleError, hint, nearest
from minigpt4.common.registry import KINDS, Registry
from minigpt4.common.utils import (
    JsonLines,
    decode,
    exit_status,
    parse_json,
    require_readable,
    require_whole_characters,
    write_json,
)

TEXT = "a\tcafé\x0b\x0c\r\n東京 🗼"


# How commands begin and end


def test_large_packages_come_without_the_collector_which_is_back_also_after_a_failure():
    code = (
        "import gc\nfrom minigpt4.common.utils import quick_imports\n"
        "try:\n with quick_imports():\n  print(gc.isenabled())\n  import no_such_package\n"
        "except ImportError: print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\nTrue True\n"


def test_a_users_error_is_a_line_and_status_2_and_a_bug_is_not(capsys):
    def fail():
        raise ConfigError("model.ckpt: there is no file x.pth")

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: model.ckpt: there is no file x.pth\n"
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_terminal_that_knows_few_characters_shows_the_others_as_escapes(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert exit_status(lambda: sys.stdout.write("é \udce9")) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"\\xe9 \\udce9"


def test_few_names_are_listed_behind_the_nearest_and_many_only_where_none_is_near():
    assert hint("modle", ["run", "model"]) == "did you mean 'model'? Known: model, run"
    assert nearest("zzz", ["model", "run"]) is None
    names = [f"key_{letter}" for letter in "abcdefghijklmnop"] + ["image_size"]
    assert hint("image_sise", names) == "did you mean 'image_size'?"
    assert hint("xyz", names).startswith("Known: image_size, key_a, key_b")


# Text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-le"])
def test_text_with_a_mark_and_json_in_every_encoding_are_read(encoding):
    assert encoding[-2:] in ("be", "le") or decode(TEXT.encode(encoding)) == TEXT
    assert parse_json('{"a": "é"}'.encode(encoding)) == {"a": "é"}


@pytest.mark.parametrize(
    ("read", "content", "complaint"),
    [
        (decode, "one\ntwo é".encode("cp1252"), "not UTF-8 text .byte 0xe9 in line 2"),
        (decode, b"\xff\xfea", "not UTF-16 text"),
        (decode, "\ud83d".encode("utf-8", "surrogatepass"), "not UTF-8 text"),
        (decode, TEXT.encode()[:-1], "not UTF-8 text"),
        (parse_json, '{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        (parse_json, "[" * 100_000, "nested too deeply"),
        (parse_json, '{"a": ' + "1" * 5000 + "}", "digits"),
        (parse_json, b'{"a": "\xe9"}', "not UTF-8 text"),
    ],
)
def test_what_would_lose_something_is_refused_with_its_place(read, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        read(content)


@pytest.mark.parametrize("code", [0, 4, 0x0E, 0x1B, 0x7F, 0xFFFD, 0xD83D, 0xDCE9])
def test_text_of_which_something_was_lost_is_refused_by_name(code):
    with pytest.raises(SampleError, match="a.json, record 2: the caption cannot be read: character 3 is"):
        require_readable(f"a {chr(code)} dog", "a.json, record 2: the caption")
    assert require_readable(TEXT, "the caption") == TEXT


def test_text_that_is_only_compared_may_hold_what_a_model_may_write():
    assert require_whole_characters("a \ufffd\0", "the caption") == "a \ufffd\0"
    with pytest.raises(SampleError, match="the caption cannot be read"):
        require_whole_characters("\ud83d", "the caption")


# Files


def test_json_of_any_text_is_written_and_a_refusal_names_option_and_file(tmp_path):
    content = {"name": "é", "score": 0.5, "image": "caf\udce9.jpg"}
    write_json(tmp_path / "a.json", content)
    assert parse_json((tmp_path / "a.json").read_bytes()) == content
    write_json(tmp_path / "new" / "b.json", {})
    with pytest.raises(ConfigError, match=r"--save_path: cannot write .*a\.json/b\.json"):
        write_json(tmp_path / "a.json" / "b.json", {}, "--save_path")


MANY = """
import pathlib, sys
from minigpt4.common.utils import write_whole
for turn in range(20):
    write_whole(pathlib.Path(sys.argv[1]) / str(turn), sys.argv[2] * 9999)
"""


def test_many_processes_may_write_the_same_file(tmp_path):
    commands = [[sys.executable, "-c", MANY, str(tmp_path), letter] for letter in "abcdef"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate()[1] for process in processes] == [""] * len(processes)
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, range(20)))
    assert all(len(set(path.read_text())) == 1 for path in tmp_path.iterdir())


def test_every_line_is_strict_json_of_any_text(tmp_path):
    lines = JsonLines(tmp_path / "log.txt")
    assert lines.read() == []
    lines.keep(lambda record: True)
    assert list(tmp_path.iterdir()) == []
    lines.append({"train_lr": "0.001", "train_loss": "7.861"})
    lines.append({"loss": float("nan"), "best": float("-inf"), "caption": "café", "image": "caf\udce9"})
    first, second = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert first == '{"train_lr": "0.001", "train_loss": "7.861"}'
    expected = {"loss": None, "best": None, "caption": "café", "image": "caf\udce9"}
    assert json.loads(second, parse_constant=pytest.fail) == lines.read()[1] == expected


def test_damaged_lines_and_what_is_refused_are_dropped_and_no_other(tmp_path):
    path, whole = tmp_path / "lines.jsonl", b'{"step": 1, "a": "\\u00e9\xe2\x80\xa8"}\n'
    path.write_bytes(b'{"a": "caf\xe9"}\n' + whole + b"[" * 100_000 + b'\n[1]\n{"step": 5}\n{"ste')
    lines = JsonLines(path)
    assert lines.read() == [{"step": 1, "a": "é\u2028"}, {"step": 5}]
    lines.keep(lambda record: record["step"] < 5)
    assert path.read_bytes() == whole


def test_a_full_disk_or_a_file_that_cannot_be_read_costs_one_warning(tmp_path, caplog):
    full, folder = JsonLines(Path("/dev/full")), JsonLines(tmp_path)
    for step in (1, 2):
        full.append({"step": step})
    assert folder.read() == []
    folder.keep(lambda line: False)
    first, second = caplog.messages
    assert first.startswith("/dev/full: cannot be written (No space left on device)")
    assert second.startswith(f"{tmp_path}: cannot be read (Is a directory)")


# The registry


class Walker:
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_registered_class_is_found_and_listed_under_its_kind_only(kind):
    registry = Registry()
    assert getattr(registry, f"register_{kind}")("thing")(Walker) is Walker
    assert getattr(registry, f"get_{kind}_class")("thing") is Walker
    assert {k: getattr(registry, f"list_{k}s")() for k in KINDS} == {k: ["thing"] if k == kind else [] for k in KINDS}
    with pytest.raises(RegistryError, match="did you mean 'thing'"):
        getattr(registry, f"get_{kind}_class")("thinh")


def test_same_name_for_another_class_is_refused_but_for_a_reloaded_one():
    registry = Registry()
    registry.register_model("minigpt4")(Walker)
    with pytest.raises(RegistryError, match="already registered as .*Walker"):
        registry.register_model("minigpt4")(dict)
    reloaded = type("Walker", (), {"__module__": Walker.__module__, "__qualname__": Walker.__qualname__})
    registry.register_model("minigpt4")(reloaded)
    assert registry.get_model_class("minigpt4") is reloaded
