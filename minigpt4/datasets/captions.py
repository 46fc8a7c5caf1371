"""The captions of a record: one, or a list in its field `captions` or, as in LAVIS's files, in place of the one."""

from collections.abc import Mapping
from typing import Any

from minigpt4.common.errors import SampleError
from minigpt4.common.text import parse_json, require_whole_characters

CAPTIONS = "captions"
"""Field of a record with the single captions of its image."""
JOINED = "grounded_caption"
"""Field of the captions of an image in one string, as `prepare_flickr30k.py` writes it."""


def single_captions(record: Mapping[str, Any], field: str, where: str) -> list[str] | None:
    """The list of captions of a record, None if it has none; `field` is that of the one caption."""
    value = record[field] if isinstance(record.get(field), list) else record.get(CAPTIONS)
    return caption_list(value, where) if value else None


def caption_list(value: Any, where: str) -> list[str]:
    """The captions of a list, or of a list as JSON, without blank ones; SampleError if it is none."""
    try:
        captions = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise SampleError(f"{where}: the captions are not JSON: {error}") from error
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SampleError(f"{where}: the captions must be a list of texts; they are {captions!r:.80}")
    for number, caption in enumerate(captions, start=1):
        require_whole_characters(caption, f"{where}: caption {number}")
    return [caption for caption in captions if caption.strip()]
