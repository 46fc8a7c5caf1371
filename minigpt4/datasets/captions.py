"""The single captions of an image: a list in a record's field `captions`, written as JSON where a file holds text."""

import json
from typing import Any

from minigpt4.common.errors import SampleError

CAPTIONS = "captions"
"""Field of a record with the single captions of its image."""
JOINED = "grounded_caption"
"""Field of the captions of an image in one string, as `prepare_flickr30k.py` writes it."""


def caption_list(value: Any, where: str) -> list[str]:
    """The captions of a list, or of a list as JSON, without blank ones; SampleError if it is none."""
    try:
        captions = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise SampleError(f"{where}: the captions are not JSON: {error}") from error
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SampleError(f"{where}: the captions must be a list of texts; they are {captions!r:.80}")
    return [caption for caption in captions if caption.strip()]
