"""Chat in a terminal: questions from standard input, answers on standard output, everything else on standard error."""

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from minigpt4.common.errors import MiniGPT4Error, SampleError, errors_as
from minigpt4.conversation.chat import Chat, Decoding
from minigpt4.processors import open_image

HELP = "/image FILE shows another image, /again asks the last question anew, /restart forgets everything, /help is this"
HINT = f"{HELP}. Ctrl-C ends an answer; an empty line ends the conversation.\n"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class Terminal:
    """A conversation in a terminal, or through pipes.

    Args:
        chat: with an engine that works in a thread of its own, which Ctrl-C does not reach.
        seed: of the first answer's sampling, one more for each further answer; None: unlike any other.
    """

    def __init__(self, chat: Chat, decoding: Decoding, seed: int | None = None) -> None:
        self.chat, self._decoding, self._seed = chat, decoding, seed
        self._status = 0

    def answer(self, question: str) -> int:
        """One answer; the exit status: 0, 130 after Ctrl-C. MiniGPT4Error if there is none."""
        return 0 if self._say(self.chat.stream(question, self._decoding, self._next_seed())) else INTERRUPTED

    def talk(self) -> int:
        """Answer questions until an empty line or the end of the input; the exit status: 2 if one had no answer.

        An error of a question does not end the conversation.
        """
        if sys.stdin.isatty():
            sys.stderr.write(HINT)
        while line := self._read():
            try:
                self._do(line)
            except MiniGPT4Error as error:
                sys.stderr.write(f"error: {error}\n")
                self._status = 2
        return 0 if sys.stdin.isatty() else self._status

    def _read(self) -> str:
        try:
            return input("you: " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    def _do(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            with errors_as(SampleError, f"/image {rest.strip()}"):
                path = Path(rest.strip()).expanduser()
            self.chat.show(open_image(path))
        elif command == "/again":
            self._say(self.chat.regenerate(self._decoding, self._next_seed()))
        elif command == "/restart":
            self.chat.restart()
        elif command == "/help":
            sys.stderr.write(HINT)
        elif command.startswith("/") and command.count("/") == 1:
            raise SampleError(f"there is no command {command}: {HELP}")
        else:
            self._say(self.chat.stream(line, self._decoding, self._next_seed()))

    def _say(self, pieces: Iterator[str]) -> bool:
        """Print the pieces as they come; False after Ctrl-C, which ends the answer."""
        try:
            with closing(pieces):
                for piece in pieces:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            return False
        sys.stdout.write("\n")
        sys.stdout.flush()
        reply = self.chat.reply
        if reply.dropped_turns:
            sys.stderr.write(f"(the oldest turns were left out: {reply.dropped_turns})\n")
        if reply.finish_reason == "length":
            sys.stderr.write(f"(cut at {reply.completion_tokens} tokens; see --max-new-tokens)\n")
        return True

    def _next_seed(self) -> int | None:
        seed = self._seed
        if seed is not None:
            self._seed = seed + 1
        return seed
