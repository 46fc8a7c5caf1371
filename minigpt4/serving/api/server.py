"""Listening, and ending well."""

import ipaddress
import logging
import os
import socket

import uvicorn
from fastapi import FastAPI

from minigpt4.common.errors import ConfigError
from minigpt4.serving.api.connection import GuardedConnection
from minigpt4.serving.api.limits import ApiLimits

log = logging.getLogger(__name__)

KEY_VARIABLE = "MINIGPT4_API_KEY"


def api_key() -> str | None:
    """The key of the environment, None where there is none; ConfigError, which does not show it, for a useless one."""
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{KEY_VARIABLE}: is empty, or holds blanks or signs that no key has; set it again or unset it"
        )
    return key


def bind(host: str, port: int) -> socket.socket:
    """A socket with its address, which does not listen yet; ConfigError if the address is taken or not ours."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With its protocol said, or asyncio leaves Nagle's algorithm on, which holds pieces of a stream back for 40 ms.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another --port or --host") from error
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def address_of(bound: socket.socket) -> str:
    """Its URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: FastAPI, limits: ApiLimits) -> uvicorn.Server:
    """A server; `run(sockets=[...])` returns when a signal came and the running answers ended, or had their time."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=GuardedConnection.within(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=limits.shutdown_seconds,
        )
    )
