"""An answer as it is read while it grows: nothing that was said is taken back."""

from collections.abc import Sequence

_END, _BEGIN = "</s>", "<s>"  # LLMs also write these two as plain text
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
        return self._say(self._certain(text))

    def finish(self, text: str) -> str:
        """The last piece; `text` is whole."""
        return self._say(self._without_start(self._cut(text).replace(_BEGIN, "").strip()).strip())

    def _say(self, readable: str) -> str:
        piece = readable[len(self.said) :]
        self.said += piece
        return piece

    def _certain(self, text: str) -> str:
        cut = self._cut(text)
        if len(cut) == len(text):
            cut = _without_beginning_of(cut.rstrip(_INCOMPLETE), [*self._ends, _BEGIN])
        readable = cut.replace(_BEGIN, "").strip()
        if self._answer_start.startswith(readable):
            return ""
        return self._without_start(readable).strip()

    def _cut(self, text: str) -> str:
        return text[: min((text.find(end) for end in self._ends if end in text), default=len(text))]

    def _without_start(self, text: str) -> str:
        return text.removeprefix(self._answer_start)


def _without_beginning_of(text: str, marks: Sequence[str]) -> str:
    """`text` without the longest ending that begins one of the marks."""
    longest = max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return text[: len(text) - longest]
