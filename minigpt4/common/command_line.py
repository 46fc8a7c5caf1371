"""How commands end."""

import io
import sys
from collections.abc import Callable

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
