"""The conversations of the page, one for each open tab; Gradio and browsers are not known here."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minigpt4.common.errors import MiniGPT4Error, SampleError
from minigpt4.conversation.chat import Backend, Chat, Decoding, Picture, Reply
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER, Turns
from minigpt4.serving.uploads import Limits, read_image

SHOWN_SIDE = 768
"""Longest side of an image in the conversation, pixels."""
PATIENCE = 20.0
"""Seconds that a stopped answer has to end in: it notices between two tokens."""


KEEP = 600.0
"""Seconds that the conversation of a closed tab is kept: a connection that broke may come back."""
MOST = 200
"""Conversations; those that were used longest ago go first."""
NAMES = 50
"""Names of tabs that are known for each conversation: a page that was only looked at has a name, too."""


class NotNowError(MiniGPT4Error):
    """Something that has to wait for the end of an answer."""


@dataclass(eq=False)
class Turn:
    """A question, the image that was shown with it, and the answer as far as it has come."""

    question: str
    upload: Path | None
    """The image as the visitor sent it."""
    shown: Path | None
    """The image as the page shows it."""
    before: "Snapshot"
    answer: str = ""
    is_over: bool = False


@dataclass(frozen=True)
class Snapshot:
    """The state of a conversation, to go back to."""

    turns: tuple[Turn, ...]
    conversation: Turns
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Message:
    """A line of the conversation as the page shows it: a text or an image."""

    is_user: bool
    content: str | Path
    turn: int
    """Number of the turn it belongs to."""


class PageSession:
    """A visitor's conversation; its methods may be called from any thread.

    First `put`, `put_again` or `put_edited`, which check what was sent and show it; then `answer`, which may come
    later, because answers wait in a queue. What gets no answer becomes a draft again.

    Args:
        backend: runs the model, such as an `Engine` that was started.
        folder: where images are kept for the page to show.
    """

    def __init__(self, backend: Backend, limits: Limits, folder: Path) -> None:
        self.limits, self._backend, self._folder = limits, backend, folder
        self._lock = threading.RLock()
        self._idle = threading.Event()
        self._idle.set()
        self.shown: set[Path] = set()
        """Files of this conversation's images."""
        self._clear()

    def _clear(self) -> None:
        self.turns: list[Turn] = []
        self.note = ""
        self._chat = Chat(self._backend, timeout=self.limits.seconds)
        self._waits = False
        self._saved = self._now()
        self._draft: Turn | None = None
        self._tidy()

    # What the page shows

    @property
    def messages(self) -> list[Message]:
        """The conversation, in order."""
        found = []
        for number, turn in enumerate(self.turns):
            if turn.shown is not None:
                found.append(Message(True, turn.shown, number))
            found.append(Message(True, turn.question, number))
            if turn.answer or turn.is_over:
                found.append(Message(False, turn.answer or "(no answer)", number))
        return found

    @property
    def is_busy(self) -> bool:
        """Whether an answer waits or is being written."""
        return self._waits or not self._idle.is_set()

    def take_draft(self) -> Turn | None:
        """The turn that was not answered, once."""
        draft, self._draft = self._draft, None
        return draft

    # Asking

    def put(self, question: str, upload: Path | None = None) -> None:
        """Ask about an image, or about those before.

        Raises:
            NotNowError: an answer is being written.
            SampleError: nothing was asked, or the image cannot be used.
        """
        with self._lock:
            self._begin_to_put(question)
            before, shown = self._now(), None
            if upload is not None:
                if len(self._chat.pictures) >= self.limits.images:
                    raise SampleError(f"{self.limits.images} images are the most in one conversation; start over")
                shown = self._show(read_image(upload, self.limits))
            self._put(Turn(question.strip(), upload, shown, before))

    def put_again(self) -> None:
        """Ask the last question once more, in place of its answer; else as `put`."""
        with self._lock:
            if not self.turns:
                raise SampleError("nothing was asked yet")
            self.put_edited(len(self.turns) - 1, self.turns[-1].question)

    def put_edited(self, number: int, question: str) -> None:
        """Ask another question in the place of an earlier one; what was said since is forgotten. Else as `put`."""
        with self._lock:
            self._begin_to_put(question)
            if not 0 <= number < len(self.turns):
                raise SampleError("this question is not there any more")
            old, saved, pictures = self.turns[number], self._now(), self._chat.pictures
            self._go_to(old.before)
            if old.shown is not None:
                self._chat.pictures.append(pictures[len(old.before.pictures)])
                self._chat.conversation.add_image()
            self._put(Turn(question.strip(), old.upload, old.shown, old.before), saved)

    def _begin_to_put(self, question: str) -> None:
        self._refuse_while_busy()
        if self._waits:  # its place in the queue was lost
            self._withdraw()
            self._draft = None
        if not question.strip():
            raise SampleError("write a question")
        if len(question) > self.limits.question_chars:
            raise SampleError(
                f"the question has {len(question):,} characters; {self.limits.question_chars:,} are the most"
            )
        if IMAGE_PLACEHOLDER in question:
            raise SampleError(f"a question must not hold {IMAGE_PLACEHOLDER}, which stands for an image")
        if 2 * len(self.turns) >= self.limits.turns:
            raise SampleError("this conversation is as long as it may be; start over")

    def _show(self, image: Image.Image) -> Path:
        shown = self._folder / f"{self._chat.show(image)}.jpg"
        if not shown.exists():
            small = image.copy()
            small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
            self._folder.mkdir(parents=True, exist_ok=True)
            small.save(shown, quality=90)
            self.shown.add(shown)
        return shown

    def _tidy(self) -> None:
        """Delete the files of images that the conversation does not show any more."""
        for path in self.shown - {turn.shown for turn in (*self.turns, *self._saved.turns)}:
            path.unlink(missing_ok=True)
            self.shown.discard(path)

    def _put(self, turn: Turn, saved: Snapshot | None = None) -> None:
        self._saved = saved or turn.before
        self.turns.append(turn)
        self._waits, self.note = True, ""
        self._tidy()

    # Answering

    def answer(self, decoding: Decoding, checkpoint: str | None = None, seed: int | None = None) -> Iterator[None]:
        """Write the answer to what was put, and yield whenever it has grown; nothing, if it was withdrawn meanwhile.

        Closing the iterator stops the answer.

        Raises:
            MiniGPT4Error: there is no answer, and what was asked is a draft again.
            TimeoutError: it took too long; what was said so far stays.
        """
        with self._lock:
            if not self._waits:
                return
            self._waits, turn, chat = False, self.turns[-1], self._chat
            self._idle.clear()
        chat.checkpoint, chat.reply = checkpoint, None
        try:
            with closing(chat.stream(turn.question, decoding, seed)) as pieces:
                for piece in pieces:
                    turn.answer += piece
                    self.note = _note(chat.reply, self._backend)
                    yield
        finally:
            with self._lock:
                reply = chat.reply
                if turn.answer or (reply is not None and reply.finish_reason in ("stop", "length")):
                    turn.is_over, self.note = True, _note(reply, self._backend)
                else:
                    self._withdraw()
                self._idle.set()

    def stop(self) -> None:
        """End the answer in the making; without a word of it the question is a draft again."""
        with self._lock:
            if self._waits:
                self._withdraw()
        self._interrupt()

    def restart(self) -> None:
        """Forget everything."""
        self._interrupt()
        with self._lock:
            self._refuse_while_busy()
            self._clear()

    def close(self) -> None:
        """Forget everything, and delete its files; nobody comes back."""
        self.stop()
        with self._lock:
            if self._idle.is_set():
                self._clear()
                with suppress(OSError):  # nothing was shown, or others' images are there, too
                    self._folder.rmdir()

    def take_back(self) -> None:
        """Make the last question a draft again, and forget its answer; NotNowError while it is being written."""
        with self._lock:
            self._refuse_while_busy()
            if self.turns:
                self._saved = self.turns[-1].before
                self._withdraw()
                self.note = ""

    def _interrupt(self) -> None:
        """Wait for the end of the answer in the making, which is told to end."""
        for _ in range(int(PATIENCE / 0.05)):
            reply = self._chat.reply  # a thread that has only just begun to answer has none yet
            if reply is not None and not self._idle.is_set():
                reply.close()
            if self._idle.wait(0.05):
                return

    def _refuse_while_busy(self) -> None:
        if not self._idle.is_set():
            raise NotNowError("an answer is being written; stop it first")

    def _withdraw(self) -> None:
        self._draft, self._waits = self.turns[-1], False
        self._go_to(self._saved)

    def _now(self) -> Snapshot:
        return Snapshot(tuple(self.turns), self._chat.conversation.copy(), tuple(self._chat.pictures))

    def _go_to(self, snapshot: Snapshot) -> None:
        self.turns = list(snapshot.turns)
        self._chat.conversation, self._chat.pictures = snapshot.conversation.copy(), list(snapshot.pictures)


def _note(reply: Reply | None, backend: Backend) -> str:
    """What there is to know about an answer."""
    if reply is None:
        return ""
    parts = [f"{reply.prompt_tokens:,} tokens read, {reply.completion_tokens:,} written"]
    if reply.dropped_turns:
        turns = "turn was" if reply.dropped_turns == 1 else f"{reply.dropped_turns} turns were"
        parts.append(f"the oldest {turns} left out: this LLM reads {backend.context_length:,} positions")
    ends = {"length": "ended at the limit of tokens", "cancelled": "stopped"}
    return " · ".join([*parts, *filter(None, [ends.get(reply.finish_reason)])])


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
