"""Text from outside: what is read, what is refused with its place, what every output takes."""

import io
import sys

import pytest

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import (
    decode,
    escaped,
    exit_status,
    parse_json,
    require_readable,
    require_whole_characters,
    write_json,
)

TEXT = "a\tcafé\x0b\x0c\r\n東京 🗼"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marked_text_is_read_without_its_mark(encoding):
    assert decode(TEXT.encode(encoding)) == TEXT


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("one\ntwo é".encode("cp1252"), "not UTF-8 text .byte 0xe9 in line 2"),
        (b"\xff\xfea", "not UTF-16 text"),
        ("\ud83d".encode("utf-8", "surrogatepass"), "not UTF-8 text"),
        (TEXT.encode()[:-1], "not UTF-8 text"),
    ],
)
def test_other_bytes_are_refused_with_their_place(content, complaint):
    with pytest.raises(ValueError, match=complaint):
        decode(content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
def test_json_is_read_in_every_encoding_that_it_may_have(encoding):
    assert parse_json('{"a": "é"}'.encode(encoding)) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
        (b'{"a": "\xe9"}', "not UTF-8 text"),
    ],
)
def test_json_that_would_lose_something_is_refused(content, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_json(content)


@pytest.mark.parametrize("code", [0, 4, 0x0E, 0x1B, 0x7F, 0xFFFD, 0xD83D, 0xDCE9])
def test_text_of_which_something_was_lost_is_refused_by_name(code):
    with pytest.raises(SampleError, match="a.json, record 2: the caption cannot be read: character 3 is"):
        require_readable(f"a {chr(code)} dog", "a.json, record 2: the caption")
    assert require_readable(TEXT, "the caption") == TEXT


def test_text_that_is_only_compared_may_hold_what_a_model_may_write():
    assert require_whole_characters("a \ufffd\0", "the caption") == "a \ufffd\0"
    with pytest.raises(SampleError, match="the caption cannot be read"):
        require_whole_characters("\ud83d", "the caption")


def test_any_text_can_be_written_and_comes_back_from_json(tmp_path):
    write_json(tmp_path / "a.json", {"image": "caf\udce9.jpg"})
    assert parse_json((tmp_path / "a.json").read_bytes()) == {"image": "caf\udce9.jpg"}
    assert escaped("é 🗼") == "é 🗼"


def test_terminal_that_knows_few_characters_shows_the_others_as_escapes(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert exit_status(lambda: sys.stdout.write("é \udce9")) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"\\xe9 \\udce9"
