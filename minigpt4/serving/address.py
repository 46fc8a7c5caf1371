"""Where a server or a page listens, and who may enter: options and checks that commands share."""

import argparse
import importlib.util
import ipaddress
import logging
import os
import socket

from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.utils import install_command

log = logging.getLogger(__name__)

AUTH_VARIABLE = "MINIGPT4_AUTH"
"""USER:PASSWORD; an option would show in the process list."""


def add_address_arguments(group: argparse._ActionsContainer) -> None:
    """Options that `require_address` reads."""
    group.add_argument("--server-name", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (127.0.0.1)")
    group.add_argument("--port", type=int, help="(the first free one from 7860)")
    group.add_argument("--auth", metavar="USER:PASSWORD", help=f"require a login; better set {AUTH_VARIABLE}")
    group.add_argument("--share", action="store_true", help="public address, through Gradio's tunnel")


def require_address(args: argparse.Namespace, instead: str = "") -> None:
    """ConfigError for what would keep a page from being served, before anything heavy loads; `args.auth` becomes user
    and password. `instead`: what can be done without gradio."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError(f"gradio is not installed; run: {install_command('demo')}{instead}")
    if given := args.auth or os.environ.get(AUTH_VARIABLE):
        user, _, password = given.partition(":")
        if not (user and password):
            raise ConfigError(f"--auth and {AUTH_VARIABLE}: write USER:PASSWORD")
        args.auth = user, password
    with listen(args.server_name, args.port, "--server-name") as bound:
        if not is_local(bound) and not args.auth:
            log.warning("Who reaches %s can use the page; --auth asks for a password", args.server_name)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and later
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks its own server whether it is there


def listen(host: str, port: int | None, option: str = "--host") -> socket.socket:
    """A socket with its address, which does not listen yet; None: any port. ConfigError, which names `option`, if the
    address is taken or not ours."""
    named = f"{option} {host}" if port is None else f"{option} {host} --port {port}"
    with errors_as(ConfigError, f"{named}: cannot listen there; choose another --port or {option}"):
        if port is not None and not 0 <= port < 1 << 16:  # which getaddrinfo would wrap
            raise OverflowError("ports are 1 to 65535")
        found = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        # With its protocol said, or asyncio leaves Nagle's algorithm on, which holds pieces of a stream back for 40 ms.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def address_of(bound: socket.socket) -> str:
    """Its URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
