import pytest

from minigpt4.conversation.decoding import TextStream


def pieces(text, stop=("###",), start="", chars=1):
    """What is said while `text` grows by `chars` characters at a time, and at its end."""
    stream = TextStream(stop, start)
    said = [stream.feed(text[:end]) for end in range(chars, len(text) + 1, chars)]
    return [*said, stream.finish(text)]


@pytest.mark.parametrize("chars", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A dog sleeps.", "A dog sleeps."),
        ("  A dog.\n\n", "A dog."),
        ("A dog.###Human: more", "A dog."),
        ("A #1 dog ## here", "A #1 dog ## here"),
        ("A dog.##", "A dog.##"),
        ("A dog</s> cat", "A dog"),
        ("<s> A <s>dog", "A dog"),
        ("a < b", "a < b"),
        ("", ""),
        ("   ", ""),
        ("###", ""),
    ],
)
def test_pieces_joined_are_the_answer_however_it_grows(text, said, chars):
    assert "".join(pieces(text, chars=chars)) == said


def test_text_is_said_as_it_comes():
    assert pieces("One two", chars=1) == ["O", "n", "e", "", " t", "w", "o", ""]


def test_what_may_become_a_stop_string_waits():
    stream = TextStream(["###"])
    assert [stream.feed(text) for text in ("a", "a#", "a##", "a##b")] == ["a", "", "", "##b"]


def test_half_a_character_waits_for_its_other_bytes():
    stream = TextStream()
    assert [stream.feed("caf\ufffd"), stream.feed("caf\ufffd\ufffd"), stream.feed("café")] == ["caf", "", "é"]
    assert stream.finish("café\ufffd") == "\ufffd"


def test_blanks_wait_until_a_word_follows():
    stream = TextStream()
    assert [stream.feed("a  \n"), stream.feed("a  \nb")] == ["a", "  \nb"]


def test_a_repeated_role_is_not_said():
    assert "".join(pieces("Assistant: A dog.", start="Assistant:")) == "A dog."
    assert "".join(pieces("Assistants work.", start="Assistant:")) == "Assistants work."


def test_nothing_is_taken_back_when_decoded_text_changes():
    stream = TextStream()
    stream.feed("A dog .")
    assert stream.finish("A dog.") == ""
    assert stream.said == "A dog ."
