"""Text from outside: what is read, what is refused with its place; and how commands end."""

import io
import sys

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.utils import decode, exit_status, parse_json, require_readable, require_whole_characters

TEXT = "a\tcafé\x0b\x0c\r\n東京 🗼"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marked_text_is_read_without_its_mark(encoding):
    assert decode(TEXT.encode(encoding)) == TEXT


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
def test_json_is_read_in_every_encoding_that_it_may_have(encoding):
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
