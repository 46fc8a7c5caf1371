"""From the messages of a request to a conversation in the model's template."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from minigpt4.conversation.turns import IMAGE_MESSAGE, IMAGE_PLACEHOLDER, Turns
from minigpt4.serving.api.errors import wrong
from minigpt4.serving.api.limits import ApiLimits
from minigpt4.serving.api.schema import ChatRequest, Message, Part

SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class ImageReference:
    """An image of a request that was not looked at yet."""

    url: str
    field: str
    """Where it stands in the request."""


@dataclass(frozen=True)
class Talk:
    """What is to be answered."""

    conversation: Turns
    """Ends in an open answer."""
    images: list[ImageReference]
    """One for each placeholder of the conversation, in their order."""


def read_talk(request: ChatRequest, new_conversation: Callable[[], Turns], limits: ApiLimits) -> Talk:
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
    return Talk(conversation, images)


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
