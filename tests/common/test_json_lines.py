"""JSON lines under kills and full disks."""

import json
import logging
from pathlib import Path

import pytest

from minigpt4.common.utils import JsonLines


def test_every_line_is_strict_json(tmp_path):
    lines = JsonLines(tmp_path / "log.txt")
    lines.append({"train_lr": "0.001", "train_loss": "7.861"})
    lines.append({"loss": float("nan"), "best": float("-inf"), "caption": "café"})
    text = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert text[0] == '{"train_lr": "0.001", "train_loss": "7.861"}'
    assert json.loads(text[1], parse_constant=pytest.fail) == {"loss": None, "best": None, "caption": "café"}


def test_keep_drops_what_is_refused_and_what_a_kill_cut_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 5}\n[1]\n{"ste')
    JsonLines(file).keep(lambda record: record["step"] < 5)
    assert file.read_text() == '{"step": 1}\n'


def test_read_gives_the_whole_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert JsonLines(file).read() == []
    file.write_text('{"step": 1}\n[1]\n{"step": 2}\n{"ste')
    assert JsonLines(file).read() == [{"step": 1}, {"step": 2}]


def test_damaged_line_is_dropped_and_no_other(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": "caf\xe9"}\n{"a": "\\u00e9\xe2\x80\xa8"}\n' + b"[" * 100_000 + b"\n")
    assert JsonLines(path).read() == [{"a": "é\u2028"}]
    JsonLines(path).keep(lambda record: True)
    assert path.read_bytes() == b'{"a": "\\u00e9\xe2\x80\xa8"}\n'


def test_any_text_can_be_written(tmp_path):
    JsonLines(tmp_path / "lines.jsonl").append({"image": "caf\udce9"})
    assert JsonLines(tmp_path / "lines.jsonl").read() == [{"image": "caf\udce9"}]


def test_keep_of_a_missing_file_makes_none(tmp_path):
    JsonLines(tmp_path / "log.txt").keep(lambda record: True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_costs_the_lines_and_is_said_once(caplog):
    caplog.set_level(logging.WARNING)
    lines = JsonLines(Path("/dev/full"))
    lines.append({"step": 1})
    lines.append({"step": 2})
    assert [record.message for record in caplog.records] == [
        "/dev/full: cannot be written (No space left on device); its lines are lost until that is fixed"
    ]


def test_a_name_that_is_no_unicode_is_written_as_json_writes_it(tmp_path):
    lines = JsonLines(tmp_path / "log.txt")
    lines.append({"file": "caf\udce9.jpg", "said": "été"})
    assert lines.read() == [{"file": "caf\udce9.jpg", "said": "été"}]


def test_a_file_that_cannot_be_read_costs_a_warning_and_stays(tmp_path, caplog):
    (tmp_path / "log.txt").mkdir()
    lines = JsonLines(tmp_path / "log.txt")
    assert lines.read() == []
    lines.keep(lambda line: False)
    assert "cannot be read (Is a directory)" in caplog.text
    assert (tmp_path / "log.txt").is_dir()
