"""Serves the page, and answers only what the page itself asks of Gradio's server.

Without it a client could make Gradio fetch any address, and fill the disk: Gradio limits each file, not their sum.
"""

import json
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Container
from pathlib import Path
from re import ASCII, compile
from typing import Any, Protocol

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.common.errors import ConfigError
from minigpt4.serving.uploads import MIB, Limits

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
"""What the browser may ask for: this server alone, whatever an answer names."""
API = "/gradio_api/"
UPLOAD = f"{API}upload"
FILE = f"{API}file="
READ = compile(
    r"/(?:(?:config|logout)/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(?:assets|static|svelte)/[\w./@+~-]+)?"
    rf"|{API}(?:startup-events|login_check|user|app_id|info|upload_progress|queue/(?:data|status)|heartbeat/[\w-]+)/?"
    rf"|{FILE}(?!\w+:).*",
    ASCII,
)
WRITTEN = compile(rf"/login/?|{API}(?:queue/join|run/predict|cancel|reset|upload)/?")
CALL_BYTES = 4 * MIB
"""Of a call, which holds the conversation."""
FORM_BYTES = 64 << 10
"""What an upload has besides its file."""
STORED = 8
"""Conversations full of the largest images may be stored at once."""
TABS = 200
"""Whose state is kept."""

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
CODE_FONTS = ("ui-monospace", "DejaVu Sans Mono", "monospace")


class Page(Protocol):
    """What can be served."""

    blocks: gr.Blocks
    limits: Limits
    files: Container[str] | None
    """Paths that may be read; None: what Gradio allows, uploads."""
    settings: dict[str, Any]
    """Further arguments of `Blocks.launch`."""


def launch(page: Page, *, host: str, port: int | None, auth: tuple[str, str] | None, share: bool) -> str:
    """Serve the page, and return its address; ConfigError if that cannot be."""
    theme = gr.themes.Soft(primary_hue="blue", font=FONTS, font_mono=CODE_FONTS)
    try:
        _, local, public = page.blocks.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=share,
            theme=theme,
            max_file_size=page.limits.image_bytes,
            state_session_capacity=TABS,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Gate, limits=page.limits, files=page.files)]},
            **page.settings,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"the page cannot be served: {error}") from error
    return public or local


def show(page: Page, args: Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM. `args`: as `require_address` left them."""
    over = threading.Event()
    address = launch(page, host=args.server_name, port=args.port, auth=args.auth, share=args.share)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    sys.stdout.write(f"The page is at {address} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    over.wait()
    page.blocks.close(verbose=False)


class Gate:
    """The app of Gradio behind it, the browser in front."""

    def __init__(self, app: ASGIApp, limits: Limits, files: Container[str] | None) -> None:
        self._files = files
        self._app, self._most = app, limits.images * limits.image_bytes
        self._uploads = Path(gr.utils.get_upload_folder()).resolve()
        self._incoming = 0
        """Bytes of uploads that are not stored yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, text, receive = await self._checked(scope, receive)

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        answer = PlainTextResponse(text, status) if status else self._app
        incoming = _length(scope) if not status and scope["path"].startswith(UPLOAD) else 0
        self._incoming += incoming
        try:
            await answer(scope, receive, send_with_policy)
        finally:
            self._incoming -= incoming

    async def _checked(self, scope: Scope, receive: Receive) -> tuple[int, str, Receive]:
        """The status and reason to refuse a request with, 0 to let it pass; and what its body is read from."""
        path, reads = scope["path"], scope["method"] in ("GET", "HEAD")
        if not (READ if reads else WRITTEN).fullmatch(path):
            return 404, "there is no such path", receive
        if path.startswith(FILE) and self._files is not None and path.removeprefix(FILE) not in self._files:
            return 404, "there is no such file", receive
        if reads or path.startswith("/login"):
            return 0, "", receive
        is_upload, length = path.startswith(UPLOAD), _length(scope)
        if length < 0:
            return 411, "send the header Content-Length", receive
        if length > (self._most + FORM_BYTES if is_upload else CALL_BYTES):
            return 413, "too large; send a smaller image", receive
        if is_upload:
            stored = sum(file.stat().st_size for file in self._uploads.rglob("*") if file.is_file())
            is_full = stored + self._incoming + length > STORED * self._most
            return (503 if is_full else 0), "there is no room for more images; try again later", receive
        body = b""
        while len(body) < length:
            message = await receive()
            if message["type"] == "http.disconnect":
                return 400, "the request broke off", receive
            body += message.get("body", b"")
        try:
            json.loads(body, object_hook=self._check_object)
        except (ValueError, OSError, RuntimeError) as error:
            return 400, str(error), receive
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return rest.pop() if rest else await receive()

        return 0, "", receive_again

    def _check_object(self, values: dict[str, Any]) -> None:
        """ValueError for a file that is no upload, such as an address that Gradio would fetch, and for components."""
        path = values.get("path")
        if path and not (isinstance(path, str) and Path(path).resolve().is_relative_to(self._uploads)):
            raise ValueError("path: the image is not here; give it again")
        if "component" in values:
            raise ValueError("component: messages hold text and images only")


def _length(scope: Scope) -> int:
    """Of a request's body, as its head says; -1 where it does not."""
    return int(dict(scope["headers"]).get(b"content-length", -1))
