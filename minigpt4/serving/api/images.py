"""From the image references of a request, data URLs or addresses, to what the model sees.

Images are fetched from hosts that are named only, and never from an inner address: a name is looked up once for a
connection, every address that it has is checked, and the connection goes to one of these, so a name that changes in
between gains nothing. Proxies of the environment are not used: they would connect for us, unchecked.
"""

import asyncio
import base64
import binascii
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import httpcore2
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.conversation.chat import Picture
from minigpt4.serving.api.access import ApiError, ApiLimits, as_api_error, wrong
from minigpt4.serving.api.schema import ImageReference, Reservation
from minigpt4.serving.uploads import MIB, Limits, TooLargeError, read_image

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "minigpt4", "Connection": "close"}
INVALID = "invalid_image_url"
HOW = "write it as data:image/png;base64,..."
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
NOT_PUBLIC = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")]
"""Reserved ranges that some versions of Python's tables call global."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Result = TypeVar("Result")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet: no inner, multicast or reserved one, no wrapped IPv4."""
    ip = ipaddress.ip_address(address)
    if any(ip in network for network in NOT_PUBLIC):
        return False
    if isinstance(ip, ipaddress.IPv6Address):  # mapped, site-local, NAT64 and multicast ones are outside 2000::/3
        return ip.is_global and ip in PUBLIC_IPV6 and ip.sixtofour is None and ip.teredo is None
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def look_up(host: str, port: int) -> list[str]:
    """Every address of a name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True)
class Place:
    """A URL in parts, each of which was checked."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query."""

    @property
    def url(self) -> httpcore2.URL:
        """For the client, which then does not take the text apart again."""
        return httpcore2.URL(scheme=self.scheme, host=self.host, port=self.port, target=self.target)

    @property
    def host_header(self) -> str:
        """The host as HTTP wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


class AllowedHosts:
    """Hosts by name, `images.example.com`, or with a port besides 80 and 443, `images.example.com:8443`.

    Raises ConfigError for what is no such name.
    """

    def __init__(self, hosts: Iterable[str]) -> None:
        self._hosts = {_allowed_host(host) for host in hosts}

    def __bool__(self) -> bool:
        return bool(self._hosts)

    def place(self, url: str) -> Place:
        """A URL that may be asked; ApiError 400 for any other."""
        if not url.isascii() or not url.isprintable() or " " in url:
            raise wrong("the URL holds blanks or signs that no URL has; encode them", code=INVALID)
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise wrong(f"this is no URL ({error})", code=INVALID) from None
        if parts.scheme not in PORTS:
            raise wrong("the URL must begin with data:, http: or https:", code=INVALID)
        if "@" in parts.netloc:
            raise wrong("the URL must not hold a user name", code=INVALID)
        standard = PORTS[parts.scheme]
        port = standard if port is None else port
        if (host, port) not in self._hosts and not (port == standard and (host, None) in self._hosts):
            raise wrong("images of this host are not allowed here; send the image as a data URL", code=INVALID)
        return Place(parts.scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


def _allowed_host(text: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{text.lower()}")
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        host = ""
    if not host or "@" in text or "*" in text or parts.path or parts.query or not text.isascii():
        raise ConfigError(f"--allow-image-host: {text!r} is no host such as images.example.com")
    return host, port


class CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses only.

    Args:
        resolve: addresses of a host.
        is_allowed: whether an address may be connected to.
    """

    def __init__(self, resolve: Resolve = look_up, is_allowed: Callable[[str], bool] = is_public) -> None:
        self._resolve, self._is_allowed = resolve, is_allowed
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, **options: Any) -> httpcore2.AsyncNetworkStream:
        """A connection to an address of `host` that was checked; ApiError 400 if one of them is not allowed."""
        try:
            addresses = await self._resolve(host, port)
        except OSError:
            raise wrong("the image's host is not known", code=INVALID) from None
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise wrong("the image's host has an address that is not public", code=INVALID)
        for address in addresses[:-1]:
            try:
                return await self._network.connect_tcp(address, port, **options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._network.connect_tcp(addresses[-1], port, **options)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._network.sleep(seconds)


class RemoteImages:
    """Fetches images, a few at a time; with no allowed host it refuses every URL."""

    def __init__(self, hosts: AllowedHosts, limits: ApiLimits, network: CheckedNetwork | None = None) -> None:
        self._hosts, self._limits = hosts, limits
        self._network = network or CheckedNetwork()
        self._slots = asyncio.Semaphore(4 * limits.readers)

    async def fetch(self, url: str, reserved: Reservation) -> bytes:
        """The bytes behind a URL.

        Raises:
            ApiError: 400, the URL is not allowed, or no image came.
            TooLargeError: more bytes than an image may have.
        """
        if not self._hosts:
            raise wrong("images by URL are switched off here; send the image as a data URL", code=INVALID)
        place = self._hosts.place(url)
        try:
            async with asyncio.timeout(self._limits.fetch_seconds), self._slots:
                return await self._followed(place, reserved)
        except TimeoutError:
            message = f"the image did not come within {self._limits.fetch_seconds:g} s"
            raise wrong(message, code=INVALID) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError):
            raise wrong("the image's host does not answer as it should", code=INVALID) from None

    async def _followed(self, place: Place, reserved: Reservation) -> bytes:
        for _ in range(self._limits.redirects + 1):
            found = await self._asked(place, reserved)
            if isinstance(found, bytes):
                return found
            place = found
        raise wrong(f"the image is behind more than {self._limits.redirects} redirects", code=INVALID)

    async def _asked(self, place: Place, reserved: Reservation) -> bytes | Place:
        """The image, or where it is said to be."""
        headers = HEADERS | {"Host": place.host_header}
        async with (
            httpcore2.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._network) as pool,
            pool.stream("GET", place.url, headers=headers) as response,
        ):
            fields = {name.lower().decode("ascii"): value.decode("latin-1") for name, value in response.headers}
            if response.status in REDIRECTS:
                here = f"{place.scheme}://{place.host_header}{place.target}"
                return self._hosts.place(urljoin(here, fields.get("location", "")))
            _check_response(response.status, fields)
            return await self._content(response, reserved)

    async def _content(self, response: httpcore2.Response, reserved: Reservation) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_stream():
            if len(content) + len(chunk) > self._limits.image_bytes:
                raise TooLargeError(f"the image has more than {self._limits.image_bytes / MIB:g} MiB")
            reserved.take(len(chunk))
            content += chunk
        return bytes(content)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpcore2.default_ssl_context()


def _check_response(status: int, fields: dict[str, str]) -> None:
    if status != 200:
        raise wrong(f"the image's host answers with status {status}", code=INVALID)
    kind = fields.get("content-type", "").partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise wrong(f"what is behind the URL is no image but {kind[:100]}", code=INVALID)
    if fields.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(400, "the image's host compresses it although it was asked not to", code=INVALID)


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

    async def read(self, references: Sequence[ImageReference], reserved: Reservation) -> list[Picture]:
        """The images in their order; ApiError, with the field, for one that cannot be had or read."""
        return [await self._picture(reference, reserved) for reference in references]

    async def _picture(self, reference: ImageReference, reserved: Reservation) -> Picture:
        try:
            if reference.url[:5].lower() == "data:":
                return await self.run(partial(self._seen, reference.url))
            content = await self._remote.fetch(reference.url, reserved)
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
        raise wrong(f"the data URL holds no image in base64; {HOW}", code=INVALID)
    size = len(content) * 3 // 4 - 2
    if size > limits.image_bytes:
        raise TooLargeError(f"the image: {size / MIB:.1f} MiB are more than {limits.image_bytes / MIB:g} MiB")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong(f"the data URL is no valid base64 ({error}); {HOW}", code=INVALID) from None
