"""How commands end."""

import sys
from collections.abc import Callable

from minigpt4.common.errors import MiniGPT4Error


def exit_status(run: Callable[[], None]) -> int:
    """0 when `run` is done; 2 after an error that the user can mend, whose text goes to stderr."""
    try:
        run()
    except MiniGPT4Error as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
