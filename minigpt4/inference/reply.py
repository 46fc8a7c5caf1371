"""An answer in the making, between the thread that makes it and whoever reads it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator

from minigpt4.conversation.requests import Request
from minigpt4.conversation.text_stream import TextStream

CANCELLED = "cancelled"


class EngineReply:
    """A `Reply`: pieces to iterate over, in any one thread; counts to look at in between.

    Args:
        request: what is answered.
        drive: makes the engine work for a reader that waits; None where a thread of its own does.
        notify: called, in the engine's thread, whenever there is something new to read.
    """

    def __init__(
        self, request: Request, drive: Callable[[], None] | None = None, notify: Callable[[], None] | None = None
    ) -> None:
        self.request = request
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.dropped_turns = 0
        self.finish_reason: str | None = None
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.stop = [*filter(None, [request.conversation.answer_end]), *request.stop]
        self._stream = TextStream(self.stop, request.conversation.answer_start)
        self._drive, self._notify = drive, notify
        self._news: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        self._is_over = threading.Event()

    # For the reader

    def __iter__(self) -> Iterator[str]:
        """The pieces; an error of the answer is raised where it happened."""
        while True:
            while self._drive is not None and self._news.empty():
                self._drive()
            news = self._news.get()
            if news is None:
                return
            if isinstance(news, Exception):
                raise news
            yield news

    def waiting_news(self) -> list[str | Exception | None]:
        """What can be read without waiting: pieces, then None or an error at the end; for asynchronous readers."""
        news = []
        while not self._news.empty():
            news.append(self._news.get())
        return news

    def close(self) -> None:
        """No further words are wanted; the engine notices before its next token."""
        if not self._is_over.is_set():
            self._end(CANCELLED)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._is_over.is_set()

    # For the engine

    def grow(self, text: str, tokens: int) -> None:
        """The answer's text so far, and how many tokens it has."""
        self.completion_tokens = tokens
        self._put(self._stream.feed(text))

    def finish(self, text: str, tokens: int, ended: bool) -> None:
        """The answer is whole: ended by the model, or by the token limit."""
        self.completion_tokens = tokens
        self._put(self._stream.finish(text))
        self._end("stop" if ended else "length")

    def fail(self, error: Exception) -> None:
        """There will be no answer, or no more of it."""
        if not self._is_over.is_set():
            self._is_over.set()
            self._news.put(error)
            self._tell()

    def _put(self, piece: str) -> None:
        if piece and not self._is_over.is_set():
            self._news.put(piece)
            self._tell()

    def _end(self, reason: str) -> None:
        if not self._is_over.is_set():
            self.finish_reason = reason
            self._is_over.set()
            self._news.put(None)
            self._tell()

    def _tell(self) -> None:
        if self._notify is not None:
            self._notify()
