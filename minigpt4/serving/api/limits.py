"""What a client of the API may cost, beyond what one visitor may ask for."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from minigpt4.common.errors import ConfigError
from minigpt4.common.hints import hint
from minigpt4.serving.limits import MIB, Limits


@dataclass(frozen=True)
class ApiLimits(Limits):
    """Upper bounds of the API; none of them can be switched off, only raised."""

    body_bytes: int = 64 * MIB
    """Of one request's body; base64 makes an image a third larger."""
    held_bytes: int = 256 * MIB
    """Of all requests' bodies and fetched images together that are not yet turned into the model's input."""
    conversation_chars: int = 200_000
    """Of all messages of a request together."""
    answers: int = 8
    """`n` of one request."""
    stop_chars: int = 200
    """Of one stop string."""
    header_seconds: float = 20.0
    """For a request's first line and headers to come, and for a connection to begin the next request."""
    body_seconds: float = 60.0
    """For a request's body to come."""
    write_seconds: float = 60.0
    """For a client that does not read to go on reading."""
    fetch_seconds: float = 15.0
    """For one remote image to come, redirects and name lookup included."""
    redirects: int = 3
    """Of one remote image."""
    readers: int = 2
    """Requests whose images are decoded at once, and four times as many remote images that are fetched at once."""
    connections: int = 512
    """Open at once; a request on one more is answered with 503."""
    shutdown_seconds: float = 10.0
    """For running answers to end after a signal."""

    @classmethod
    def changed(cls, values: Sequence[str]) -> Self:
        """The defaults with some changed by texts `name=value`; ConfigError for a wrong name or value."""
        changes = {}
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        for text in values:
            name, _, value = text.partition("=")
            if name not in fields:
                raise ConfigError(f"--limits: there is no limit '{name}'; {hint(name, fields)}")
            try:
                changes[name] = fields[name](value)
            except ValueError:
                raise ConfigError(f"--limits: {text}: {value!r} is no {fields[name].__name__}") from None
        return cls(**changes)
