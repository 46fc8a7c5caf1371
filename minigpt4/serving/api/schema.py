"""The body of a chat completion: which fields there are, of which types, and what becomes of the others."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from minigpt4.common.hints import hint
from minigpt4.serving.api.errors import wrong

IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
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
    shown = [f"{path(error['loc'])}: {_reason(error)}".removeprefix(": ") for error in errors[:SHOWN_ERRORS]]
    more = [f"and {len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []
    return wrong("; ".join(shown + more), path(errors[0]["loc"]) or None)


def _reason(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Value error, ")


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
