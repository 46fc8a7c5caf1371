"""From a request for a chat completion to its answer."""

from dataclasses import dataclass
from functools import partial

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from minigpt4.conversation.requests import Picture
from minigpt4.conversation.requests import Request as Asked
from minigpt4.inference import Engine
from minigpt4.serving.api.answers import Answers, while_connected
from minigpt4.serving.api.body import Held, Store, read_body
from minigpt4.serving.api.decoding import read_decoding
from minigpt4.serving.api.errors import unknown_model
from minigpt4.serving.api.images import RequestImages
from minigpt4.serving.api.limits import ApiLimits
from minigpt4.serving.api.observing import Trace
from minigpt4.serving.api.remote import RemoteImages
from minigpt4.serving.api.replies import Completion, EventStream
from minigpt4.serving.api.schema import ChatRequest, read_request
from minigpt4.serving.api.talk import Talk, read_talk

GRACE = 5.0
"""Seconds beyond `limits.seconds` after which an engine that does not end an answer is given up."""
SEEDS = 2**63


@dataclass(frozen=True)
class Plan:
    """What is left of a request when its texts and images are the model's input; it holds no image file any more."""

    model: str
    requests: list[Asked]
    """To the engine, one for each answer."""
    is_stream: bool
    include_usage: bool


class Service:
    """Answers chat completions.

    Args:
        engine: answers; its thread runs.
        remote: where images by URL come from.
    """

    def __init__(self, engine: Engine, limits: ApiLimits, remote: RemoteImages) -> None:
        self.engine, self.limits = engine, limits
        self.store = Store(limits.held_bytes)
        self.images = RequestImages(engine.look, limits, remote)

    async def chat(self, request: Request) -> Response:
        """The answer to a request, whole or as a stream."""
        trace: Trace = request.state.trace
        with self.store.held() as held:
            plan = await self._plan(request, held)
        trace.model = plan.model
        answers = Answers(self.engine, plan.requests)
        completion = Completion(plan.model, answers, plan.include_usage)
        response = None
        try:
            response = await self._answered(request, completion, trace, plan.is_stream)
            return response
        finally:
            if not isinstance(response, EventStream):  # which ends the answers itself
                answers.close()
                trace.count(answers)

    async def _plan(self, request: Request, held: Held) -> Plan:
        body = await read_body(request, self.limits, held)
        async with while_connected(request.receive, self.limits.seconds):
            wanted, talk = await self.images.run(partial(self._read, body))
            pictures = await self.images.read(talk.images, held)
        options = wanted.stream_options
        requests = self._requests(wanted, talk, pictures)
        return Plan(wanted.model, requests, bool(wanted.stream), bool(options and options.include_usage))

    def _read(self, body: bytearray) -> tuple[ChatRequest, Talk]:
        """All checks that need no image."""
        wanted = read_request(body)
        if wanted.model not in self.engine.checkpoints:
            raise unknown_model(wanted.model, self.engine.checkpoints)
        read_decoding(wanted, self.limits)
        return wanted, read_talk(wanted, self.engine.new_conversation, self.limits)

    def _requests(self, wanted: ChatRequest, talk: Talk, pictures: list[Picture]) -> list[Asked]:
        asked = partial(
            Asked,
            pictures=pictures,
            decoding=read_decoding(wanted, self.limits),
            stop=wanted.stop or (),
            checkpoint=wanted.model,
            timeout=self.limits.seconds,
        )
        seeds = [None if wanted.seed is None else (wanted.seed + n) % SEEDS for n in range(wanted.n or 1)]
        return [asked(talk.conversation.copy(), seed=seed) for seed in seeds]

    async def _answered(self, request: Request, completion: Completion, trace: Trace, is_stream: bool) -> Response:
        answers, texts = completion.answers, [""] * len(completion.answers.replies)
        async with while_connected(request.receive, self.limits.seconds + GRACE):
            await answers.begin()  # errors before the first words still have a status of their own
            trace.heard()
            if is_stream:
                return EventStream(completion, trace, self.limits.seconds + GRACE)
            async for index, text in answers:
                texts[index] += text or ""
        return JSONResponse(completion.whole(texts))
