"""Serves the page, and lets a browser ask what the page itself asks, and nothing else that Gradio could do.

Gradio keeps uploads in a folder that whoever knows a path may read, without a limit of their number, reads bodies of
any length, and prints a traceback for a call that the page would not make. Here uploads are taken and given out, and
calls are looked at, before Gradio sees them.
"""

import asyncio
import hmac
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
from anyio.to_thread import run_sync
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from minigpt4.common.errors import ConfigError, first_line
from minigpt4.serving.page import ChatPage
from minigpt4.serving.page_session import MOST
from minigpt4.serving.uploads import MIB, NoRoomError

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
"""What the browser may ask for: this server alone, whatever an answer names."""
COOKIE = "minigpt4_visitor"
API = "/gradio_api/"
READ = re.compile(
    r"/(?:(?:config|logout)/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(?:assets|static|svelte)/[\w./@+~-]{1,200})?"
    rf"|{API}(?:startup-events|login_check|user|app_id|info|queue/(?:data|status)|heartbeat/[\w-]{{1,64}})/?",
    re.ASCII,
)
WRITTEN = re.compile(rf"/login/?|{API}(?:queue/join|run/predict|cancel)/?")
BODY_BYTES = MIB
"""Of a call: a question of 20,000 signs takes 240 KB when each is written as JSON's \\u escapes."""
FORM_BYTES = 64 << 10
"""What an upload may have besides its file."""
UNREAD = 100
"""News that a tab may have left unread when it asks for more; each may hold a whole conversation."""
SECONDS = 60.0
"""For a body to come."""
PAUSE = 10.0
"""Seconds that an upload may rest."""

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
CODE_FONTS = ("ui-monospace", "DejaVu Sans Mono", "monospace")
CSS = """
.gradio-container { max-width: 1240px !important; width: 100%; margin: auto }
#note { min-height: 1.6em; opacity: .75 }
#chat button[title=Share] { display: none }
"""

Tab = Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
"""The name that a page gives itself when it is loaded."""


def launch(page: ChatPage, *, host: str, port: int | None, auth: tuple[str, str] | None, share: bool) -> str:
    """Serve the page, and return its address; ConfigError if that cannot be."""
    theme = gr.themes.Soft(primary_hue="blue", font=FONTS, font_mono=CODE_FONTS)
    try:
        _, local, public = page.blocks.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=share,
            theme=theme,
            css=CSS,
            max_file_size=page.limits.image_bytes,
            state_session_capacity=MOST,
            max_threads=page.engine.max_rows + 40,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Gate, page=page)]},
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"the page cannot be served: {error}") from error
    return public or local


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class Call(_Strict):
    """A call of a function of the page, as its script writes it; other fields do not reach Gradio."""

    session_hash: Tab
    fn_index: int
    data: list[Any]
    event_data: Any = None


class Cancel(_Strict):
    """The end of a call."""

    session_hash: Tab
    fn_index: int
    event_id: str | None = None


class Edit(_Strict):
    """What the page says of an edited question."""

    index: int
    value: str


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


NO_SESSION = Refused(404, "there is no such session")


class Gate:
    """The app of Gradio behind it, the browser in front; `scope["state"]["visitor"]` says who asks.

    A visitor is a browser, known by a cookie that it gets with the page; who sends none, or one that was not given
    here, is known by the address.
    """

    def __init__(self, app: Any, page: ChatPage) -> None:
        self._app, self._page, self._key = app, page, secrets.token_bytes()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, headers = Request(scope, receive), [(b"content-security-policy", POLICY.encode())]
        cookie = request.cookies.get(COOKIE, "")
        visitor = cookie[:32]
        if not hmac.compare_digest(cookie.encode(), self._signed(visitor).encode()):
            visitor = request.client.host
            if scope["path"] == "/":
                cookie = f"{COOKIE}={self._signed(secrets.token_hex(16))}; Path=/; HttpOnly; SameSite=Lax"
                headers.append((b"set-cookie", cookie.encode()))
        scope.setdefault("state", {})["visitor"] = visitor

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        try:
            answer = await self._answer(request, visitor)
        except Refused as error:
            content = {"detail": error.message, "error": error.message}
            is_shown = scope["path"].startswith(f"{API}upload")  # as it is, by Gradio's script
            answer = PlainTextResponse(error.message, error.status) if is_shown else JSONResponse(content, error.status)
        except ClientDisconnect:
            return
        await answer(scope, receive, send_with_headers)

    def _signed(self, visitor: str) -> str:
        """What the cookie holds."""
        return visitor + hmac.digest(self._key, visitor.encode(), "sha256").hex()

    async def _answer(self, request: Request, visitor: str) -> Any:
        """The app that answers."""
        path, method = request.scope["path"], request.method
        if method in ("GET", "HEAD") and path.startswith(f"{API}file="):
            return await self._file(request, path.removeprefix(f"{API}file="), visitor)
        if method in ("GET", "HEAD") and READ.fullmatch(path):
            self._check_listener(request, visitor)
            return self._app
        if method == "POST" and path.rstrip("/") == f"{API}upload":
            return await self._upload(request, visitor)
        if method == "POST" and WRITTEN.fullmatch(path):
            body = await _body(request)
            if not path.startswith("/login"):
                readers = {"cancel": self._cancelled, "queue/join": self._joined, "run/predict": self._called}
                body = _understood(readers[path.removeprefix(API).rstrip("/")], body, visitor)
            return _WithBody(self._app, body)
        raise Refused(404, "there is no such path")

    # Files

    async def _file(self, request: Request, path: str, visitor: str) -> Response:
        """An image, as bytes: browsers show it in the page, and never as a page of its own."""
        await self._check_login(request)
        if not (self._page.uploads.may_see(path, visitor) or self._page.visitors.may_see(path, visitor)):
            raise Refused(403, "there is no such image for you")
        return FileResponse(path, media_type="application/octet-stream", headers={"Cache-Control": "private"})

    async def _upload(self, request: Request, visitor: str) -> Response:
        """Take one file; answer with the list of paths that Gradio's script expects."""
        await self._check_login(request)
        limits, length = self._page.limits, request.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "say with Content-Length how long the upload is")
        if len(length) > 15 or int(length) > limits.image_bytes + FORM_BYTES:
            raise Refused(413, f"more than {limits.image_bytes / MIB:g} MiB; send a smaller image")
        try:
            with self._page.uploads.room(visitor) as (path, grow):
                async with asyncio.timeout(SECONDS):
                    await _save(request, path, grow)
        except NoRoomError as error:
            raise Refused(413 if error.is_own else 503, str(error)) from None
        except TimeoutError:
            raise Refused(408, f"the upload rested {PAUSE:g} s, or did not come within {SECONDS:g} s") from None
        return JSONResponse([str(path)])

    async def _check_login(self, request: Request) -> None:
        """Ask Gradio, which keeps the passwords."""
        status = None

        async def note(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        asked = {"method": "GET", "path": f"{API}login_check", "raw_path": f"{API}login_check".encode()}
        await self._app({**request.scope, **asked}, request.receive, note)
        if status != 200:
            raise Refused(401, "log in first")

    # Calls

    def _check_listener(self, request: Request, visitor: str) -> None:
        """Nobody hears what others are told, nor ends their visit."""
        path = request.scope["path"].rstrip("/")
        if path.startswith(f"{API}heartbeat/"):
            self._claim(path.rpartition("/")[2], visitor)
        elif path == f"{API}queue/data" and not self._page.visitors.has(
            request.query_params.get("session_hash", ""), visitor
        ):
            raise NO_SESSION

    def _claim(self, tab: str, visitor: str) -> None:
        if not self._page.visitors.claim(tab, visitor):
            raise NO_SESSION

    def _cancelled(self, body: bytes, visitor: str) -> Cancel:
        cancel = Cancel.model_validate_json(body)
        if not self._page.visitors.has(cancel.session_hash, visitor):
            raise NO_SESSION
        return cancel

    def _joined(self, body: bytes, visitor: str) -> Call:
        """A call that is answered in the tab's stream of news, which Gradio keeps until they are read."""
        call = self._called(body, visitor)
        unread = self._page.blocks._queue.pending_messages_per_session.get(call.session_hash)
        if unread is not None and unread.qsize() > UNREAD:
            raise Refused(429, "read first what you were told")
        return call

    def _called(self, body: bytes, visitor: str) -> Call:
        """A call, without what Gradio would stumble over."""
        call = Call.model_validate_json(body)
        function = self._page.blocks.fns.get(call.fn_index)
        if function is None:
            raise ValueError("fn_index: there is no such function")
        if len(call.data) != len(function.inputs):
            raise ValueError(f"data: {len(call.data)} values for {len(function.inputs)} inputs")
        call.data = [_checked(block, value) for block, value in zip(function.inputs, call.data, strict=True)]
        edit = Edit.model_validate(call.event_data).model_dump() if function.fn == self._page.put_edited else None
        call.event_data = edit and edit | {"previous_value": None}
        self._claim(call.session_hash, visitor)
        return call


def _understood(read: Callable[[bytes, str], BaseModel], body: bytes, visitor: str) -> bytes:
    """The body again, without fields that are not known here; Refused where something is wrong with it."""
    try:
        return read(body, visitor).model_dump_json().encode()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Refused(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise Refused(400, str(error)) from None


def _checked(block: Any, value: Any) -> Any:
    """A value that a block can have; ValueError for all others."""
    named = f"data: {type(block).__name__} {block.label or ''}".rstrip()
    match block, value:
        case gr.Image(), {"path": str(path)}:
            return {"path": path}  # whose it is, is seen where it is used
        case (gr.Image() | gr.Textbox(), None) | (gr.Textbox(), str()):
            return value
        case gr.Dropdown(), str() if value in dict(block.choices).values():
            return value
        case gr.Slider(), int() | float() if not isinstance(value, bool) and block.minimum <= value <= block.maximum:
            return value
        case gr.Dataset(), int() if not isinstance(value, bool) and 0 <= value < len(block.samples):
            return value
    raise ValueError(f"{named}: this value cannot be")


class _WithBody:
    """The app, given a body that was read already."""

    def __init__(self, app: Any, body: bytes) -> None:
        self._app, self._body = app, body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        told = (b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name not in told]
        headers.append((b"content-length", str(len(self._body)).encode()))
        rest = [{"type": "http.request", "body": self._body, "more_body": False}]

        async def receive_it() -> Any:
            return rest.pop() if rest else await receive()

        await self._app({**scope, "headers": headers}, receive_it, send)


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES:
                    raise Refused(413, f"the request's body is larger than {BODY_BYTES >> 10} KiB")
    except TimeoutError:
        raise Refused(408, f"the request's body did not come within {SECONDS:g} s") from None
    return bytes(body)


async def _save(request: Request, path: Path, grow: Callable[[int], None]) -> None:
    """The file of a form; `grow` is told how much of it came."""
    size = 0

    async def receive() -> Any:
        nonlocal size
        async with asyncio.timeout(PAUSE):
            message = await request.receive()
        size += len(message.get("body", b""))
        grow(size)
        return message

    try:
        form = await Request(request.scope, receive).form(max_files=1, max_fields=1, max_part_size=FORM_BYTES)
    except (ClientDisconnect, NoRoomError, TimeoutError):
        raise
    except HTTPException as error:
        raise Refused(400, f"the upload: {error.detail}") from None
    except Exception as error:  # a form that its reader did not expect
        raise Refused(400, f"the upload: {first_line(error)}") from None
    sent = form.get("files")
    if not isinstance(sent, UploadFile):
        raise Refused(400, "the upload has no file under the name 'files'")

    def copy() -> None:
        with sent.file, path.open("xb") as file:
            shutil.copyfileobj(sent.file, file)

    await run_sync(copy)
