"""A connection whose client takes too long is cut off, at every point where the server waits for the client."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4.serving.api.limits import ApiLimits


class GuardedConnection(H11Protocol):
    """uvicorn's connection with two timers, for what uvicorn waits for without an end.

    One runs while no request is worked on: until the next one's headers are there. The other runs while the client does
    not read what it is sent. Bodies are watched where they are read.
    """

    limits = ApiLimits()
    _idle: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _is_lost = False

    @classmethod
    def within(cls, limits: ApiLimits) -> type["GuardedConnection"]:
        """This class with other limits."""
        return type(cls.__name__, (cls,), {"limits": limits})

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The clock runs from the first moment."""
        super().connection_made(transport)
        self._mind()

    def data_received(self, data: bytes) -> None:
        """It stops when a request is there."""
        super().data_received(data)
        self._mind()

    def on_response_complete(self) -> None:
        """It runs again, also where uvicorn closes the connection but the last bytes are not fetched."""
        super().on_response_complete()  # begins the next request, if the client sent it ahead
        self._mind()

    def send_400_response(self, msg: str) -> None:
        """For bytes that are not HTTP; also where a request is worked on already, which then has no other answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # it has begun, or had, its answer
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._stuck = self._stuck or self._abort_after(self.limits.write_seconds)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._stuck = _cancelled(self._stuck)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        self._is_lost = True
        self._idle, self._stuck = _cancelled(self._idle), _cancelled(self._stuck)
        super().connection_lost(exc)

    def _mind(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle = _cancelled(self._idle)
        elif self._idle is None and not self._is_lost:
            self._idle = self._abort_after(self.limits.header_seconds)

    def _abort_after(self, seconds: float) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
