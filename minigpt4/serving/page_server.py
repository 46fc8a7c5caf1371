"""Serving the chat page: where, to whom, and how it looks."""

import gradio as gr
from starlette.middleware import Middleware

from minigpt4.common.errors import ConfigError
from minigpt4.serving.page import ChatPage
from minigpt4.serving.page_gate import Gate
from minigpt4.serving.page_visitors import MOST

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
CODE_FONTS = ("ui-monospace", "DejaVu Sans Mono", "monospace")
CSS = """
.gradio-container { max-width: 1240px !important; width: 100%; margin: auto }
#note { min-height: 1.6em; opacity: .75 }
#chat button[title=Share] { display: none }
"""


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
