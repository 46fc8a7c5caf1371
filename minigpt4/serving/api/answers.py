"""Answers of an engine, read in an event loop, and only as long as the client is there."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

from starlette.types import Receive

from minigpt4.conversation.requests import Request
from minigpt4.inference import Engine
from minigpt4.inference.reply import EngineReply
from minigpt4.serving.api.errors import ClientGoneError


class Answers:
    """One request's answers, all asked for at once; iterate over what is said.

    Raises what `Engine.submit` raises; then none is asked for.
    """

    def __init__(self, engine: Engine, requests: Iterable[Request]) -> None:
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._unread: list[tuple[int, str | None]] = []
        self.replies: list[EngineReply] = []
        try:
            for request in requests:
                self.replies.append(engine.submit(request, self._notify))
        except Exception:
            self.close()
            raise

    def _notify(self) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed, so nobody reads any more
            self._loop.call_soon_threadsafe(self._news.set)

    async def begin(self) -> None:
        """Wait for the first words; an error of the engine is raised."""
        while not self._unread:
            self._unread = await self._next()

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | None]]:
        """(which answer, its next piece), or (which answer, None) at its end; an error of the engine is raised."""
        open_answers = set(range(len(self.replies)))
        while open_answers:
            news, self._unread = self._unread or await self._next(), []
            for index, text in news:
                if text is None:
                    open_answers.discard(index)
                yield index, text

    async def _next(self) -> list[tuple[int, str | None]]:
        await self._news.wait()
        self._news.clear()
        news = [(index, one) for index, reply in enumerate(self.replies) for one in reply.waiting_news()]
        for _, one in news:
            if isinstance(one, Exception):
                raise one
        return news

    def close(self) -> None:
        """No further words are wanted; the engine has room for others before its next token."""
        for reply in self.replies:
            reply.close()

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt, images included."""
        return self.replies[0].prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Of all answers together."""
        return sum(reply.completion_tokens for reply in self.replies)

    @property
    def dropped_turns(self) -> int:
        """Oldest turns that did not fit into the context."""
        return self.replies[0].dropped_turns


@asynccontextmanager
async def while_connected(receive: Receive, seconds: float | None = None) -> AsyncIterator[None]:
    """What is inside ends when the client goes, with ClientGoneError, or when it takes too long, with TimeoutError.

    The body of the request must have been read.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        scope.reschedule(0)  # long ago: it is over now

    try:
        async with asyncio.timeout(seconds) as scope:
            watcher = asyncio.create_task(watch())
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if gone:
            raise ClientGoneError from None
        raise
