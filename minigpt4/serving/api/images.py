"""From the image references of a request to what the model sees."""

import asyncio
import base64
import binascii
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.conversation.requests import Picture
from minigpt4.serving.api.body import Held
from minigpt4.serving.api.errors import ApiError, as_api_error, wrong
from minigpt4.serving.api.limits import ApiLimits
from minigpt4.serving.api.remote import RemoteImages
from minigpt4.serving.api.talk import ImageReference
from minigpt4.serving.limits import MIB, Limits, TooLargeError, read_image

Result = TypeVar("Result")
HOW = "write it as data:image/png;base64,..."


class RequestImages:
    """Reads images in threads, a few at a time.

    Args:
        look: turns an upright RGB image into what the model reads.
    """

    def __init__(self, look: Callable[[Image.Image], Picture], limits: ApiLimits, remote: RemoteImages) -> None:
        self._look, self._limits, self._remote = look, limits, remote
        self._threads = ThreadPoolExecutor(limits.readers, thread_name_prefix="reader")

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do work that takes a while in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def read(self, references: Sequence[ImageReference], held: Held) -> list[Picture]:
        """The images in their order; ApiError, with the field, for one that cannot be had or read."""
        return [await self._picture(reference, held) for reference in references]

    async def _picture(self, reference: ImageReference, held: Held) -> Picture:
        try:
            if reference.url[:5].lower() == "data:":
                return await self.run(partial(self._seen, reference.url))
            content = await self._remote.fetch(reference.url, held)
            return await self.run(partial(self._seen, content))
        except (SampleError, ApiError) as error:
            told = as_api_error(error)
            message = f"{reference.field}: {told.message}"
            raise ApiError(told.status, message, param=reference.field, code=told.code, headers=told.headers) from None

    def _seen(self, source: str | bytes) -> Picture:
        content = decoded(source, self._limits) if isinstance(source, str) else source
        return self._look(read_image(content, self._limits))


def decoded(url: str, limits: Limits) -> bytes:
    """The bytes of a data URL.

    Raises:
        ApiError: 400, no image in it, or not in base64.
        TooLargeError: more bytes than an image may have.
    """
    header, comma, content = url.partition(",")
    kind, *options = header[5:].lower().split(";")
    if not comma or not kind.startswith("image/") or options[-1:] != ["base64"]:
        raise wrong(f"the data URL holds no image in base64; {HOW}", code="invalid_image_url")
    size = len(content) * 3 // 4 - 2
    if size > limits.image_bytes:
        raise TooLargeError(f"the image: {size / MIB:.1f} MiB are more than {limits.image_bytes / MIB:g} MiB")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong(f"the data URL is no valid base64 ({error}); {HOW}", code="invalid_image_url") from None
