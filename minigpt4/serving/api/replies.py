"""What the server sends: whole completions, and streams of server-sent events."""

import asyncio
import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minigpt4.serving.api.answers import Answers, while_connected
from minigpt4.serving.api.errors import SHUTTING_DOWN, ApiError, ClientGoneError, as_api_error
from minigpt4.serving.api.observing import Trace

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not collect the pieces


@dataclass(frozen=True)
class Completion:
    """The parts of a reply that do not depend on what is said."""

    model: str
    answers: Answers
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: list[str]) -> dict[str, Any]:
        """The reply to a request that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": self.answers.replies[index].finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        return self._framed("chat.completion", choices) | self._dropped() | {"usage": self.usage()}

    def first(self, index: int) -> bytes:
        """The event that opens an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str | None) -> bytes:
        """The event for a piece of an answer, or for its end."""
        if text is not None:
            return self._chunk(index, {"content": text})
        return self._chunk(index, {}, self.answers.replies[index].finish_reason)

    def last(self) -> bytes:
        """What follows all answers."""
        if not self.include_usage:
            return DONE
        return event(self._framed("chat.completion.chunk", []) | {"usage": self.usage()}) + DONE

    def usage(self) -> dict[str, int]:
        """Tokens; those of images count."""
        prompt, completion = self.answers.prompt_tokens, self.answers.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        content = self._framed("chat.completion.chunk", [choice])
        if self.include_usage:
            content["usage"] = None
        return event(content | (self._dropped() if finish_reason else {}))

    def _framed(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _dropped(self) -> dict[str, int]:
        return {"dropped_turns": self.answers.dropped_turns}


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of answers that ends when the client goes, and leaves no answer in the making behind.

    `seconds` is how long it may take.
    """

    media_type = "text/event-stream"

    def __init__(self, completion: Completion, trace: Trace, seconds: float) -> None:
        super().__init__(None, headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._completion, self._trace, self._seconds = completion, trace, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = await self._spoken(receive, send)
            await send({"type": "http.response.body", "body": last})
        except ClientGoneError:
            self._trace.client_is_gone = True
        finally:
            self._completion.answers.close()
            self._trace.count(self._completion.answers)

    async def _spoken(self, receive: Receive, send: Send) -> bytes:
        """Send all but the last events, which are returned: those of an end, or of an error."""
        completion = self._completion
        try:
            async with while_connected(receive, self._seconds):
                for index in range(len(completion.answers.replies)):
                    await _send_on(send, completion.first(index))
                async for index, text in completion.answers:
                    await _send_on(send, completion.piece(index, text))
            return completion.last()
        except ClientGoneError:
            raise
        except asyncio.CancelledError:
            self._trace.failed = True
            return event(ApiError(503, SHUTTING_DOWN).body)
        except Exception as error:  # the status is sent already, so that clients learn it from the event
            self._trace.failed = True
            return event(as_api_error(error).body)


async def _send_on(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
