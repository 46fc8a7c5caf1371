"""Files that appear whole, and JSON lines, under kills and full disks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import JsonLines, parse_json, write_json


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


def test_full_disk_costs_the_lines_and_is_said_once(caplog):
    lines = JsonLines(Path("/dev/full"))
    lines.append({"step": 1})
    lines.append({"step": 2})
    (message,) = caplog.messages
    assert message.startswith("/dev/full: cannot be written (No space left on device)")


def test_a_file_that_cannot_be_read_costs_a_warning_and_stays(tmp_path, caplog):
    (tmp_path / "log.txt").mkdir()
    lines = JsonLines(tmp_path / "log.txt")
    assert lines.read() == []
    lines.keep(lambda line: False)
    assert "cannot be read (Is a directory)" in caplog.text
    assert (tmp_path / "log.txt").is_dir()


def test_json_of_any_text_is_written_and_a_refusal_names_option_and_file(tmp_path):
    content = {"name": "é", "score": 0.5, "image": "caf\udce9.jpg"}
    write_json(tmp_path / "a.json", content)
    assert parse_json((tmp_path / "a.json").read_bytes()) == content
    with pytest.raises(ConfigError, match=r"--save_path: cannot write .*none/a\.json"):
        write_json(tmp_path / "none" / "a.json", {}, "--save_path")


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
