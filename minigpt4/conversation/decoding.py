"""How an answer is searched for, and what a person reads of it; plain data and text, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from minigpt4.common.errors import ConfigError


@dataclass(frozen=True)
class Decoding:
    """How an answer is searched for; the defaults are greedy, and those of the published `generate`."""

    num_beams: int = 1
    """Width of the beam search; 1: no search."""
    max_new_tokens: int = 20
    """Longest answer, tokens."""
    min_length: int = 1
    """Tokens before an answer may end, bos counted as in transformers 4.30."""
    top_p: float = 0.9
    """Draw from the likeliest tokens that together have this probability; read with `do_sample` only."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that stand in the answer already; 1: none."""
    length_penalty: float = 1.0
    """Exponent of the length that a beam's score is divided by; above 1 favours longer answers. Read with
    `num_beams` above 1 only."""
    temperature: float = 1.0
    """Divides the logits before tokens are drawn; read with `do_sample` only."""
    do_sample: bool = False
    """Draw tokens at random; False takes the likeliest."""

    def __post_init__(self) -> None:
        ranges = {
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_length": (self.min_length >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "temperature": (
                self.temperature > 0 or not self.do_sample,
                "above 0; for the likeliest answer set do_sample to False",
            ),
        }
        wrong = [f"{key}: {getattr(self, key)} must be {rule}" for key, (holds, rule) in ranges.items() if not holds]
        if wrong:
            raise ConfigError("\n".join(wrong))

    @classmethod
    def at(cls, temperature: float, **others: Any) -> Self:
        """Sampling at a temperature; 0 is greedy."""
        return cls(temperature=temperature or 1.0, do_sample=temperature != 0, **others)


PUBLISHED_CHAT = Decoding(max_new_tokens=300, do_sample=True, repetition_penalty=1.05)
"""How the published demo answers."""

GREEDY = Decoding(max_new_tokens=300)


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    ended: bool | None
    """True: an end token or a stop string came; False: the token limit did; None: unknown."""


_BEGIN, _END = "<s>", "</s>"  # LLMs also write these two as plain text


def cut_at(text: str, marks: Sequence[str]) -> str:
    """`text` up to the first of the marks in it; an empty mark cuts nothing."""
    return text[: min((text.find(mark) for mark in marks if mark and mark in text), default=len(text))]


def clean_answer(text: str, end: str = "###", start: str = "Assistant:") -> str:
    """The assistant's turn in decoded text of a chat, without blanks at both ends.

    What follows the first `end` is cut off; of a prompt that was repeated only what follows the last `start` stays.
    An empty mark cuts nothing. The marks are a conversation's `answer_end` and `answer_start`; the defaults are Vicuna
    v0's.
    """
    text = cut_at(text, [end])
    return (text.rsplit(start, 1)[-1] if start else text).strip()


def clean_generated(text: str, stop: Sequence[str] = ()) -> str:
    """The answer in decoded text of `model.generate`: up to a stop string or `</s>`, without `<s>`, after `[/INST]`."""
    return clean_answer(cut_at(text, [*stop, _END]).replace(_BEGIN, ""), end="", start="[/INST]")


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Cuts growing text into pieces that are final.

    The pieces joined are the answer: up to the first stop string or `</s>`, without `<s>`, without a repeated
    `answer_start` at the beginning and blanks at both ends. What may still become part of a mark waits, and so do
    characters of which some bytes are missing.
    """

    def __init__(self, stop: Sequence[str] = (), answer_start: str = "") -> None:
        self.said = ""
        self._ends = [*stop, _END]
        self._answer_start = answer_start

    def feed(self, text: str) -> str:
        """The new piece, possibly "", now that the whole text so far is `text`."""
        cut = cut_at(text, self._ends)
        if len(cut) == len(text):
            cut = _without_partial_mark(cut.rstrip(_INCOMPLETE), [*self._ends, _BEGIN])
        readable = cut.replace(_BEGIN, "").strip()
        return self._say("" if self._answer_start.startswith(readable) else readable)

    def finish(self, text: str) -> str:
        """The last piece; `text` is whole."""
        return self._say(cut_at(text, self._ends).replace(_BEGIN, "").strip())

    def _say(self, readable: str) -> str:
        piece = readable.removeprefix(self._answer_start).strip()[len(self.said) :]
        self.said += piece
        return piece


def _without_partial_mark(text: str, marks: Sequence[str]) -> str:
    """`text` without the longest ending that begins one of the marks."""
    longest = max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return text[: len(text) - longest]
