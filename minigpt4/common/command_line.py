"""How commands end."""

import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from minigpt4.common.errors import MiniGPT4Error


def exit_status(run: Callable[[], None]) -> int:
    """0 when `run` is done; 2 after an error that the user can mend, whose text goes to stderr.

    Characters that the terminal does not know are shown as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does by itself
    try:
        run()
    except MiniGPT4Error as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def end(status: int) -> NoReturn:
    """End the process of a server now: Python waits for its threads, and one of them may still decode an image."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(status)
