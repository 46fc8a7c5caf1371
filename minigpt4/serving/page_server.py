"""Serving the chat page: where, to whom, and what a browser may do with it."""

from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from minigpt4.common.errors import ConfigError
from minigpt4.serving.page import ChatPage

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
CODE_FONTS = ("ui-monospace", "DejaVu Sans Mono", "monospace")
CSS = """
.gradio-container { max-width: 1240px !important; width: 100%; margin: auto }
#note { min-height: 1.6em; opacity: .75 }
#chat button[title=Share] { display: none }
"""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
"""What the browser may ask for: this server alone, whatever an answer names."""


class OwnRequestsOnly:
    """Sends `POLICY` with everything."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


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
            max_threads=page.engine.max_rows + 40,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(OwnRequestsOnly)]},
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"the page cannot be served: {error}") from error
    return public or local
