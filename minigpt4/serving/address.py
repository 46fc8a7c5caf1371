"""Where a page listens and who may enter: options and checks that its commands share."""

import argparse
import importlib.util
import logging
import os
import socket

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import install_command

log = logging.getLogger(__name__)

AUTH_VARIABLE = "MINIGPT4_AUTH"
"""USER:PASSWORD; an option would show in the process list."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_address_arguments(group: argparse._ActionsContainer) -> None:
    """Options that `require_address` reads."""
    group.add_argument("--server-name", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (127.0.0.1)")
    group.add_argument("--port", type=int, help="(the first free one from 7860)")
    group.add_argument("--auth", metavar="USER:PASSWORD", help=f"require a login; better set {AUTH_VARIABLE}")
    group.add_argument("--share", action="store_true", help="public address, through Gradio's tunnel")


def require_address(args: argparse.Namespace, instead: str = "") -> None:
    """ConfigError for what would keep a page from being served, before anything heavy loads; `args.auth` becomes user
    and password. `instead`: what can be done without gradio."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError(f"gradio is not installed; run: {install_command('demo')}{instead}")
    args.auth = credentials(args.auth or os.environ.get(AUTH_VARIABLE))
    require_free_port(args.server_name, args.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and later
    if args.server_name not in LOOPBACK and args.auth is None:
        log.warning("Who reaches %s can use the page; --auth asks for a password", args.server_name)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks its own server whether it is there


def credentials(text: str | None) -> tuple[str, str] | None:
    """User and password of `USER:PASSWORD`."""
    if not text:
        return None
    user, sign, password = text.partition(":")
    if not (user and sign and password):
        raise ConfigError(f"--auth and {AUTH_VARIABLE}: write USER:PASSWORD")
    return user, password


def require_free_port(host: str, port: int | None) -> None:
    """ConfigError for an address that cannot be listened at."""
    try:
        if port is not None and not 0 < port < 65536:
            raise OverflowError("ports are 1 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        named = f"--server-name {host}" if port is None else f"--server-name {host} --port {port}"
        raise ConfigError(f"{named}: cannot listen there ({error}); another --port may be free") from error
