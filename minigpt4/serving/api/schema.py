"""The body of a chat completion: reading it, its fields, and the decoding and conversation that they ask for."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from minigpt4.common.errors import hint
from minigpt4.conversation.decoding import PUBLISHED_CHAT, Decoding
from minigpt4.conversation.templates import IMAGE_MESSAGE, IMAGE_PLACEHOLDER, Turns
from minigpt4.serving.api.access import RETRY_AFTER, ApiError, ApiLimits, ClientGoneError, wrong
from minigpt4.serving.uploads import MIB

IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
IGNORED |= {"service_tier", "store", "user"}
"""Fields of OpenAI's API that do not change what is answered."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that would change the answer, and the values at which they do not."""
SHOWN_ERRORS = 5
VALUES = 500_000
"""In a body; commas and brackets of its texts count, too. An empty list takes three bytes there, and fifty here."""
SEPARATORS = (b",", b"[", b"{")
COLD = 0.01
"""Temperatures below are taken for 0: dividing by them gains nothing but numbers that overflow."""
SYSTEM = ("system", "developer")


class Reservation:
    """Bytes that one request holds."""

    def __init__(self, budget: "ByteBudget") -> None:
        self._budget, self.bytes = budget, 0

    def take(self, count: int) -> None:
        """So many more; ApiError 503 if the server holds too many already."""
        if self._budget.bytes + count > self._budget.limit:
            message = "too many large requests at once; try again later"
            raise ApiError(503, message, code="busy", headers=RETRY_AFTER | {"Connection": "close"})
        self._budget.bytes += count
        self.bytes += count


class ByteBudget:
    """Bytes that all requests hold together; used in the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """The account of one request, which is given back at the end."""
        reserved = Reservation(self)
        try:
            yield reserved
        finally:
            self.bytes -= reserved.bytes


async def read_body(request: Request, limits: ApiLimits, reserved: Reservation) -> bytearray:
    """The body, looked at while it comes.

    Raises:
        ApiError: 413 too large, 408 too slow, 415 not JSON, 400 no number in Content-Length, 503 no room.
        ClientGoneError: the client left before it had sent everything.
    """
    _check_headers(request, limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.body_bytes:
                    raise _too_large(limits)
                reserved.take(len(chunk))
                body += chunk
    except TimeoutError:
        message = f"the request's body did not come within {limits.body_seconds:g} s"
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return body


def _check_headers(request: Request, limits: ApiLimits) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page may send other types anywhere without being asked
        raise ApiError(415, "send the header Content-Type: application/json")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise ApiError(400, "Content-Length is no number", headers={"Connection": "close"})
    if int(length) > limits.body_bytes:
        raise _too_large(limits)


def _too_large(limits: ApiLimits) -> ApiError:
    message = f"the request's body is larger than {limits.body_bytes / MIB:g} MiB; send smaller images"
    return ApiError(413, message, code="too_large")


# The fields


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ImageUrl(_Section):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Without effect: the model sees every image at one size."""


class Part(_Section):
    """A text or an image of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _has_what_it_says(self) -> "Part":
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type '{self.type}' needs the field '{self.type}'")
        return self


class Message(_Section):
    """What one side said."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part] | None, BeforeValidator(_parts)] = None
    name: str | None = None
    """Without effect."""


class StreamOptions(_Section):
    """How a stream is written."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Without effect."""


class ChatRequest(_Section):
    """The fields that are understood; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    num_beams: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed), Field(max_length=4)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "ChatRequest":
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens say different numbers; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for requests with stream: true")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Under either name."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes | bytearray) -> ChatRequest:
    """The request in a body; ApiError 400 with the path of every field that is wrong."""
    frame = _without_files(body)
    if sum(map(frame.count, SEPARATORS)) > VALUES:
        raise wrong(f"the body has more than {VALUES:,} values")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _readable(error.errors(include_url=False, include_input=False)) from None
    except RecursionError:
        raise wrong("the body is nested too deeply") from None
    json.loads(frame, object_pairs_hook=_check_names, parse_int=str, parse_float=str)
    _check_others(request.model_extra, [*ChatRequest.model_fields, *IGNORED, *NEUTRAL])
    for number, message in enumerate(request.messages):
        _check_message(message, f"messages[{number}]")
    return request


def _without_files(body: bytes | bytearray) -> bytes:
    """JSON with data URLs cut short: megabytes in which there is nothing to look for."""
    parts, at = [], 0
    while (start := body.find(b'"data:', at)) >= 0:
        end = body.find(b'"', start + 1)
        is_file = end - start > 1000 and body.find(b"\\", start, end) < 0
        parts.append(body[at : start + 1 if is_file else max(end, start + 1)])
        at = max(end, start + 1)
    return b"".join([*parts, body[at:]])


def _check_names(pairs: list[tuple[str, Any]]) -> None:
    """ApiError for an object with two values of one name, of which every reader would take another."""
    if len(dict(pairs)) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise wrong(f"{name[:100]}: given twice; leave one out", name[:100])


def _readable(errors: list[ErrorDetails]) -> Exception:
    if errors[0]["type"] == "json_invalid":
        return wrong(f"the body is no JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    reasons = [(path(error["loc"]), error["msg"].removeprefix("Value error, ")) for error in errors[:SHOWN_ERRORS]]
    shown = [f"{field}: {reason}".removeprefix(": ") for field, reason in reasons]
    more = [f"and {len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []
    return wrong("; ".join(shown + more), path(errors[0]["loc"]) or None)


def path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") as `messages[0].content`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc).removeprefix(".")


def _check_others(extra: Mapping[str, Any] | None, known: list[str]) -> None:
    """ApiError for a field that would change the answer, if it were understood."""
    for name, value in (extra or {}).items():
        if value is None or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise wrong(f"{name[:100]}: unknown field; {hint(name[:100], known)}", name[:100], "unknown_parameter")
        if value not in NEUTRAL[name]:
            raise wrong(f"{name}: this server cannot do that; leave the field out", name, "unsupported_parameter")


def _check_message(message: Message, where: str) -> None:
    """ApiError for what a message holds beside its text, such as calls of tools."""
    for name, value in (message.model_extra or {}).items():
        if value:
            field = f"{where}.{name[:100]}"
            raise wrong(f"{field}: this server knows role, content and name only", field, "unsupported_parameter")


# Decoding and conversation


def read_decoding(request: ChatRequest, limits: ApiLimits) -> Decoding:
    """What the request says, and that of the published chat where it says nothing; ApiError 400 beyond a limit."""
    length = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
    _check(length, request.max_new_tokens, limits.new_tokens)
    _check("num_beams", request.num_beams, limits.beams)
    _check("n", request.n, limits.answers)
    for number, stop in enumerate(request.stop or ()):
        if len(stop) > limits.stop_chars:
            raise wrong(f"stop[{number}]: longer than {limits.stop_chars} characters", f"stop[{number}]")
    default = PUBLISHED_CHAT
    temperature = default.temperature if request.temperature is None else request.temperature
    if request.seed is not None and (request.num_beams or 1) > 1 and temperature >= COLD:
        raise wrong("seed: has no effect on sampling with several beams; leave one of them out", "seed")
    return Decoding(
        num_beams=request.num_beams or default.num_beams,
        max_new_tokens=request.max_new_tokens or min(default.max_new_tokens, limits.new_tokens),
        top_p=request.top_p or default.top_p,
        repetition_penalty=request.repetition_penalty or default.repetition_penalty,
        temperature=temperature if temperature >= COLD else 1.0,
        do_sample=temperature >= COLD,
    )


def _check(field: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise wrong(f"{field}: {value} is more than this server's limit, {limit}", field)


@dataclass(frozen=True)
class ImageReference:
    """An image of a request that was not looked at yet."""

    url: str
    field: str
    """Where it stands in the request."""


@dataclass(frozen=True)
class ChatInput:
    """What is to be answered."""

    conversation: Turns
    """Ends in an open answer."""
    images: list[ImageReference]
    """One for each placeholder of the conversation, in their order."""


def read_conversation(request: ChatRequest, new_conversation: Callable[[], Turns], limits: ApiLimits) -> ChatInput:
    """The conversation of a request; ApiError 400 where the messages make none."""
    messages = request.messages
    _check_sizes(messages, limits)
    leading = next((n for n, message in enumerate(messages) if message.role not in SYSTEM), len(messages))
    _check_roles(messages, leading)
    conversation = new_conversation()
    if leading:
        conversation.set_system("\n".join(_text(message, n) for n, message in enumerate(messages[:leading])))
    said = [(message.role, _text(message, n)) for n, message in enumerate(messages) if n >= leading]
    for role, turn in groupby(filter(lambda one: one[1], said), key=lambda one: one[0]):
        conversation.append_message(conversation.roles[role == "assistant"], "\n".join(text for _, text in turn))
    conversation.open_answer()
    images = list(_images(messages))
    if len(images) > limits.images:
        raise wrong(f"messages: {len(images)} images are more than {limits.images}", "messages")
    if conversation.get_prompt().count(IMAGE_PLACEHOLDER) != len(images):
        raise wrong("messages: the model's chat template does not keep this conversation's images", "messages")
    return ChatInput(conversation, images)


def _check_sizes(messages: Sequence[Message], limits: ApiLimits) -> None:
    if len(messages) > limits.turns:
        raise wrong(f"messages: {len(messages)} messages are more than {limits.turns}", "messages")
    sizes = [sum(len(part.text or "") for part in message.content or []) for message in messages]
    for number, size in enumerate(sizes):
        if size > limits.question_chars:
            field = f"messages[{number}].content"
            raise wrong(f"{field}: {size:,} characters are more than {limits.question_chars:,}", field)
    if sum(sizes) > limits.conversation_chars:
        raise wrong(f"messages: {sum(sizes):,} characters are more than {limits.conversation_chars:,}", "messages")


def _check_roles(messages: Sequence[Message], leading: int) -> None:
    for number, message in enumerate(messages[leading:], leading):
        if message.role in SYSTEM:
            field = f"messages[{number}].role"
            raise wrong(f"{field}: a {message.role} message must come before all others", field)
    if messages[-1].role != "user":
        raise wrong("messages: the last message must be the user's", f"messages[{len(messages) - 1}].role")


def _text(message: Message, number: int) -> str:
    """The message as the LLM reads it, images as placeholders; only an assistant may have said nothing."""
    field = f"messages[{number}].content"
    parts = message.content or []
    if message.role != "user" and any(part.type == "image_url" for part in parts):
        raise wrong(f"{field}: only a user's message may hold an image", field)
    text, last = "", None
    for index, part in enumerate(parts):
        piece = _piece(part, f"{field}[{index}]" if len(parts) > 1 else field)
        if piece:
            blank = "\n" if last == part.type == "text" else " "
            text, last = f"{text}{blank if text else ''}{piece}", part.type
    if not text and message.role != "assistant":
        raise wrong(f"{field}: the message is empty", field)
    return text


def _piece(part: Part, field: str) -> str:
    if part.type == "image_url":
        return IMAGE_MESSAGE
    if IMAGE_PLACEHOLDER in part.text:
        raise wrong(
            f"{field}: must not hold {IMAGE_PLACEHOLDER}, which stands for an image; send a part of type image_url",
            field,
        )
    return part.text.strip()


def _images(messages: Sequence[Message]) -> Iterator[ImageReference]:
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content or []):
            if part.type == "image_url":
                yield ImageReference(part.image_url.url, f"messages[{number}].content[{index}].image_url.url")
