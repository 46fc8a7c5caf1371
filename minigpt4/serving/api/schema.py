"""The body of a chat completion: its fields, and the decoding, conversation and images that they ask for."""

import base64
import binascii
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from minigpt4.common.errors import hint
from minigpt4.conversation.decoding import PUBLISHED_CHAT, Decoding
from minigpt4.conversation.templates import IMAGE_MESSAGE, IMAGE_PLACEHOLDER, Turns
from minigpt4.serving.api.access import ApiError, ApiLimits, wrong
from minigpt4.serving.uploads import MIB, TooLargeError

SHOWN_ERRORS = 5
VALUES = 500_000
"""In a body: an empty list takes three bytes there, and fifty in memory."""
COLD = 0.01
"""Temperatures below count as 0, for dividing by them overflows."""
SYSTEM = ("system", "developer")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _without_placeholder(text: str) -> str:
    if IMAGE_PLACEHOLDER in text:
        raise ValueError(f"must not hold {IMAGE_PLACEHOLDER}, which stands for an image")
    return text.strip()


def _data_url(url: str) -> str:
    kind, *options = url.partition(",")[0].lower().split(";")
    if not kind.startswith("data:") or options[-1:] != ["base64"]:  # what kind it is, its bytes say
        raise ValueError("this server fetches no images; send a data URL: data:image/png;base64,...")
    return url


class Section(BaseModel):
    """Unknown fields are errors; null is the same as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {key: one for key, one in values.items() if one is not None} if isinstance(values, dict) else values


class ImageUrl(Section):
    """An image as a data URL."""

    url: Annotated[str, AfterValidator(_data_url)]
    detail: Any = None
    """Without effect: the model sees every image at one size."""


class Part(Section):
    """A text or an image of a message."""

    type: Literal["text", "image_url"]
    text: Annotated[str, AfterValidator(_without_placeholder)] | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _has_what_it_says(self) -> "Part":
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type '{self.type}' needs the field '{self.type}'")
        return self


class Message(Section):
    """What one side said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts)] = []
    name: Any = None
    """Without effect."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: Any) -> Any:
        """Without the empty `tool_calls`, `refusal` and the like that OpenAI's clients send back."""
        return {key: one for key, one in values.items() if one} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _is_said(self) -> "Message":
        if self.role != "user" and any(part.type == "image_url" for part in self.content):
            raise ValueError("only a user's message may hold an image")
        if self.role != "assistant" and not self.text:
            raise ValueError("the message is empty")
        return self

    @property
    def text(self) -> str:
        """As the LLM reads it, images as placeholders."""
        text, last = "", None
        for part in self.content:
            piece = IMAGE_MESSAGE if part.type == "image_url" else part.text
            if piece:
                blank = "\n" if last == part.type == "text" else " "
                text, last = f"{text}{blank if text else ''}{piece}", part.type
        return text


class TextFormat(Section):
    """The only format of answers."""

    type: Literal["text"]


class StreamOptions(Section):
    """How a stream is written."""

    include_usage: bool = False
    include_obfuscation: Any = None
    """Without effect."""


Zero = Annotated[float, Field(ge=0, le=0)]
Count = Annotated[int, Field(ge=1)]


class ChatRequest(Section):
    """OpenAI's fields: those that are understood, then those that may only ask for the default, then ignored ones."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = PUBLISHED_CHAT.temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = PUBLISHED_CHAT.top_p
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = PUBLISHED_CHAT.repetition_penalty
    num_beams: Count = PUBLISHED_CHAT.num_beams
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed), Field(max_length=4)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Count = 1

    frequency_penalty: Zero = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] = {}
    logprobs: Literal[False] = False
    modalities: list[Literal["text"]] = []
    presence_penalty: Zero = 0
    response_format: TextFormat | None = None
    tool_choice: Literal["none", "auto"] = "none"
    tools: Annotated[list[Any], Field(max_length=0)] = []
    top_logprobs: Zero = 0

    metadata: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "ChatRequest":
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError("max_tokens and max_completion_tokens say different numbers; give one of them")
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options is only for requests with stream: true")
        if self.seed is not None and self.num_beams > 1 and self.temperature >= COLD:
            raise ValueError("seed has no effect on sampling with several beams; leave one of them out")
        if any(message.role in SYSTEM for message in self.messages[self.leading :]):
            raise ValueError("messages: a system message must come before all others")
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last message must be the user's")
        return self

    @property
    def leading(self) -> int:
        """System messages at the start."""
        return next((n for n, message in enumerate(self.messages) if message.role not in SYSTEM), len(self.messages))

    @property
    def max_new_tokens(self) -> int | None:
        """Under either name."""
        return self.max_completion_tokens or self.max_tokens

    def decoding(self, limits: ApiLimits) -> Decoding:
        """How to answer: that of the published chat where the request says nothing."""
        tokens = self.max_new_tokens or min(PUBLISHED_CHAT.max_new_tokens, limits.new_tokens)
        search = {"num_beams": self.num_beams, "max_new_tokens": tokens}
        search |= {"top_p": self.top_p, "repetition_penalty": self.repetition_penalty}
        return Decoding.at(self.temperature if self.temperature >= COLD else 0, **search)

    def conversation(self, new_conversation: Callable[[], Turns]) -> Turns:
        """The messages in the model's template, with an open answer at the end."""
        conversation, leading = new_conversation(), self.leading
        if leading:
            conversation.set_system("\n".join(message.text for message in self.messages[:leading]))
        said = [message for message in self.messages[leading:] if message.text]
        for role, turn in groupby(said, key=lambda message: message.role):
            conversation.append_message(
                conversation.roles[role == "assistant"], "\n".join(message.text for message in turn)
            )
        conversation.open_answer()
        if conversation.get_prompt().count(IMAGE_PLACEHOLDER) != len(list(self.images())):
            raise wrong("messages: the model's chat template does not keep this conversation's images", "messages")
        return conversation

    def images(self) -> Iterator[tuple[str, str]]:
        """(where it stands in the request, data URL) of each image."""
        for number, message in enumerate(self.messages):
            for index, part in enumerate(message.content):
                if part.type == "image_url":
                    yield f"messages[{number}].content[{index}].image_url.url", part.image_url.url


_SECTIONS = {"image_url": ImageUrl, "content": Part, "messages": Message, "stream_options": StreamOptions}
"""By the innermost field that leads to them."""


def read_request(body: bytes, limits: ApiLimits) -> ChatRequest:
    """The request in a body; ApiError 400 with the path of every field that is wrong."""
    if sum(map(body.count, (b",", b"[", b"{"))) > VALUES:
        raise wrong(f"the body has more than {VALUES:,} values")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _readable(error) from None
    sizes = [sum(len(part.text or "") for part in message.content) for message in request.messages]
    for field, value, limit in (
        ("max_tokens", request.max_new_tokens or 0, limits.new_tokens),
        ("num_beams", request.num_beams, limits.beams),
        ("n", request.n, limits.answers),
        ("stop (characters)", max(map(len, request.stop), default=0), limits.stop_chars),
        ("messages", len(request.messages), limits.turns),
        ("messages (images)", len(list(request.images())), limits.images),
        *((f"messages[{n}].content (characters)", size, limits.question_chars) for n, size in enumerate(sizes)),
        ("messages (characters)", sum(sizes), limits.conversation_chars),
    ):
        if value > limit:
            raise wrong(f"{field}: {value:,} is more than this server's limit, {limit:,}", field.partition(" ")[0])
    return request


def _readable(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return wrong(f"the body is no JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    shown = []
    for one in errors[:SHOWN_ERRORS]:
        reason = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            known = next((kind for name, kind in _SECTIONS.items() if name in one["loc"][:-1]), ChatRequest)
            reason = f"unknown field; {hint(str(one['loc'][-1])[:100], known.model_fields)}"
        shown.append(f"{_path(one['loc'])}: {reason}".removeprefix(": "))
    if len(errors) > SHOWN_ERRORS:
        shown.append(f"and {len(errors) - SHOWN_ERRORS} more")
    code = "unknown_parameter" if errors[0]["type"] == "extra_forbidden" else None
    return wrong("; ".join(shown), _path(errors[0]["loc"]) or None, code)


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") as `messages[0].content`."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in loc]
    return "".join(steps).removeprefix(".")


def decoded(url: str, limits: ApiLimits) -> bytes:
    """The file in a data URL; ApiError 400 where it is no base64, TooLargeError beyond `image_bytes`.

    As in browsers base64 may have line breaks, and lack the `=` at its end."""
    content = "".join(url.partition(",")[2].split()).rstrip("=")
    size = len(content) * 3 // 4 - 2
    if size > limits.image_bytes:
        raise TooLargeError(f"the image: {size / MIB:.1f} MiB are more than {limits.image_bytes / MIB:g} MiB")
    try:
        return base64.b64decode(content + "=" * (-len(content) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong(f"the data URL is no valid base64: {error}") from None
