"""Who is on the page: a conversation for each open tab."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from minigpt4.serving.page_session import NotNowError, PageSession

KEEP = 600.0
"""Seconds that the conversation of a closed tab is kept: a connection that broke may come back."""
MOST = 200
"""Conversations; those that were used longest ago go first."""
NAMES = 50
"""Names of tabs that are known for each conversation: a page that was only looked at has a name, too."""


class Visitors:
    """Conversations by the random name that a page gives itself when it is loaded, so that a reload starts anew.

    The page's framework has session state of its own, but keeps it for an hour after a tab was closed, copies it, and
    does not tell it that its visitor has gone: an answer without words so far, as of a search with several beams,
    would go on for nobody.

    Args:
        open_session: a new conversation.
    """

    def __init__(self, open_session: Callable[[], PageSession], keep: float = KEEP, most: int = MOST) -> None:
        self._open, self._keep, self._most = open_session, keep, most
        self._sessions: OrderedDict[str, PageSession] = OrderedDict()
        self._left: dict[str, float] = {}
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def claim(self, name: str, visitor: str) -> bool:
        """Whether a name is the visitor's, as it is from now on if it was nobody's."""
        with self._lock:
            if self._owners.setdefault(name, visitor) != visitor:
                return False
            self._owners.move_to_end(name)
            while len(self._owners) > NAMES * self._most:
                self._owners.popitem(last=False)
        return True

    def has(self, name: str, visitor: str) -> bool:
        """Whether a name is the visitor's already."""
        return isinstance(name, str) and self._owners.get(name) == visitor

    def may_see(self, path: str, visitor: str) -> bool:
        """Whether a file is an image of one of the visitor's conversations."""
        with self._lock:
            sessions = [session for name, session in self._sessions.items() if self._owners.get(name) == visitor]
        return any(Path(path) in session.shown for session in sessions)

    def session(self, name: str | None) -> PageSession:
        """The visitor's conversation; NotNowError for a caller without a name, who would share it with others."""
        if not name:
            raise NotNowError("open the page in a browser")
        with self._lock:
            self._left.pop(name, None)
            forgotten = self._forget()
            if name not in self._sessions:
                self._sessions[name] = self._open()
            self._sessions.move_to_end(name)
            session = self._sessions[name]
        for old in forgotten:
            old.close()
        return session

    def leave(self, name: str | None) -> None:
        """The visitor's tab was closed: nobody reads the answer in the making."""
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                return
            self._left[name] = time.monotonic()
        session.stop()

    def _forget(self) -> list[PageSession]:
        """Drop what nobody will come back to."""
        now = time.monotonic()
        names = [name for name, since in self._left.items() if now - since > self._keep]
        names += list(self._sessions)[: max(0, len(self._sessions) - len(names) - self._most + 1)]
        for name in names:
            self._left.pop(name, None)
        return [self._sessions.pop(name) for name in dict.fromkeys(names) if name in self._sessions]
