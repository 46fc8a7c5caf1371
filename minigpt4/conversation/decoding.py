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


def clean_generated(text: str) -> str:
    """The answer in decoded text of `model.generate`.

    What follows `</s>` is cut off, `<s>` is removed, of a prompt that was repeated only what follows the
    last `[/INST]` stays, and blanks at both ends go.
    """
    return text.split("</s>", 1)[0].replace("<s>", "").rsplit("[/INST]", 1)[-1].strip()


def clean_answer(text: str, end: str = "###", start: str = "Assistant:") -> str:
    """The assistant's turn in decoded text of a chat.

    What follows the first `end` is cut off, of a prompt that was repeated only what follows the last
    `start` stays, and blanks at both ends go. An empty mark cuts nothing. A conversation's marks are its
    `answer_end` and `answer_start`; the defaults are those of Vicuna v0.
    """
    text = text.split(end, 1)[0] if end else text
    return (text.rsplit(start, 1)[-1] if start else text).strip()


_BEGIN, _END = "<s>", "</s>"  # LLMs also write these two as plain text
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Cuts growing text into pieces that are final.

    The pieces joined are the answer: up to the first stop string or `</s>`, without `<s>`, without a repeated
    `answer_start` at the beginning and blanks at both ends. What may still become part of a mark waits, and so do
    characters of which some bytes are missing.
    """

    def __init__(self, stop: Sequence[str] = (), answer_start: str = "") -> None:
        self.said = ""
        self._ends = [*filter(None, stop), _END]
        self._answer_start = answer_start

    def feed(self, text: str) -> str:
        """The new piece, possibly "", now that the whole text so far is `text`."""
        cut = self._until_stop(text)
        if len(cut) == len(text):
            cut = _without_partial_mark(cut.rstrip(_INCOMPLETE), [*self._ends, _BEGIN])
        readable = cut.replace(_BEGIN, "").strip()
        return self._say("" if self._answer_start.startswith(readable) else readable)

    def finish(self, text: str) -> str:
        """The last piece; `text` is whole."""
        return self._say(self._until_stop(text).replace(_BEGIN, "").strip())

    def _until_stop(self, text: str) -> str:
        return text[: min((text.find(end) for end in self._ends if end in text), default=len(text))]

    def _say(self, readable: str) -> str:
        piece = readable.removeprefix(self._answer_start).strip()[len(self.said) :]
        self.said += piece
        return piece


def _without_partial_mark(text: str, marks: Sequence[str]) -> str:
    """`text` without the longest ending that begins one of the marks."""
    longest = max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return text[: len(text) - longest]
