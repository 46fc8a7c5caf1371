"""Whether records of files have the fields that they should."""

import functools
from dataclasses import is_dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from minigpt4.common.errors import SampleError


def fields_of(**kinds: Any) -> Any:
    """An object with these fields; it may have others."""
    return TypedDict("Fields", kinds)


_adapter = functools.cache(TypeAdapter)


def checked(kind: Any, content: Any, where: object) -> Any:
    """`content` as it is, or as the dataclass that `kind` is; SampleError that names record and field of a fault."""
    try:
        found = _adapter(kind).validate_python(content, strict=not is_dataclass(kind))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in fault["loc"])
        raise SampleError(f"{where}{place and f', {place.lstrip(chr(46))}'}: {fault['msg']}") from None
    return found if is_dataclass(kind) else content
