"""Chat with MiniGPT-4 about images: a page in the browser, or the terminal.

The checkpoint that the quickstart made, on a CPU; then open the address that is printed:
    python demo.py --cfg-path eval_configs/mini_eval.yaml
The published model on the first GPU, reachable from the network, with a password:
    MINIGPT4_AUTH=me:secret python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0 --server-name 0.0.0.0
Two checkpoints to choose from; the frozen parts are loaded once:
    python demo.py --cfg-path eval_configs/mini_eval.yaml --ckpt stage1=output/mini/stage1.pth
The terminal; one answer and no conversation:
    python demo.py --cli --cfg-path eval_configs/mini_eval.yaml --image data/mini/flickr30k/flickr30k-images/1000900.jpg
    python demo.py --cli --cfg-path eval_configs/minigpt4_eval.yaml --image photo.jpg --prompt "What is funny here?"
The page needs gradio, the extra `demo`.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.errors import MiniGPT4Error, SampleError, errors_as
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import end, quick_imports
from minigpt4.serving.address import add_address_arguments, require_address

if TYPE_CHECKING:
    from minigpt4.conversation.chat import Chat, Decoding
    from minigpt4.inference.engine import Engine

log = logging.getLogger(__name__)

HELP = "/image FILE shows another image, /again regenerates the answer, /restart starts over, /help shows this"
HINT = f"{HELP}. Ctrl-C ends an answer; an empty line ends the conversation.\n"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file with the model")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    parser.add_argument("--gpu-id", type=int, default=0, help="GPU to use, where there is one (0)")
    _add_page_arguments(parser.add_argument_group("page"))
    _add_terminal_arguments(parser.add_argument_group("terminal"))
    args = parser.parse_args(argv)
    args.cli = args.cli or args.prompt is not None
    if args.image and not args.cli:
        parser.error("--image belongs to --cli; the page takes images in the browser")
    return args


def _add_page_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ckpt",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="another checkpoint to choose from; repeatable",
    )
    add_address_arguments(group)
    group.add_argument("--max-image-mib", type=float, default=20, metavar="N", help="largest image file, MiB (20)")
    group.add_argument("--max-image-pixels", type=int, default=50_000_000, metavar="N", help="largest image (50000000)")


def _add_terminal_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cli", action="store_true", help="talk in the terminal")
    group.add_argument("--image", action="append", default=[], help="image to talk about; repeatable")
    group.add_argument("--prompt", help="one question; without it, reads questions until an empty line")
    group.add_argument("--num-beams", type=int, default=1, help="beams (1)")
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy (0)")
    group.add_argument("--top-p", type=float, default=0.9, help="nucleus sampling, above temperature 0 (0.9)")
    group.add_argument("--max-new-tokens", type=int, default=300, help="longest answer, tokens (300)")
    group.add_argument("--seed", type=int, help="sampling seed; default: random")


def load(args: argparse.Namespace, config: Config) -> "Engine":
    """The engine; not started."""
    with quick_imports():
        from minigpt4.serving.loading import load_engine

    return load_engine(config, args.ckpt, args.gpu_id)


def talk(args: argparse.Namespace, config: Config) -> int:
    """Answer in the terminal; the exit status."""
    with quick_imports():
        from minigpt4.conversation.chat import Chat, Decoding
        from minigpt4.processors import open_image

    images = [open_image(path) for path in args.image]
    search = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens, "top_p": args.top_p}
    decoding = Decoding.at(args.temperature, **search)
    with load(args, config) as engine:
        terminal = Terminal(Chat(engine), decoding, args.seed)
        for image in images:
            terminal.chat.show(image)
        return terminal.talk() if args.prompt is None else terminal.answer(args.prompt)


class Terminal:
    """A conversation in a terminal, or through pipes: answers on standard output, all else on standard error.

    Args:
        chat: with an engine that works in a thread of its own, which Ctrl-C does not reach.
        seed: of the first answer's sampling, one more for each further answer; None: unlike any other.
    """

    def __init__(self, chat: "Chat", decoding: "Decoding", seed: int | None = None) -> None:
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
            from minigpt4.processors import open_image

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


def serve(args: argparse.Namespace, config: Config) -> int:
    """Show the page until Ctrl-C or SIGTERM; the exit status."""
    require_address(args, instead=", or talk in the terminal: --cli")
    with quick_imports():
        from minigpt4.serving.loading import checkpoints

    checkpoints(config, args.ckpt)
    from minigpt4.serving.page import ChatPage
    from minigpt4.serving.page_gate import show
    from minigpt4.serving.uploads import MIB, Limits

    limits = Limits(image_bytes=int(args.max_image_mib * MIB), image_pixels=args.max_image_pixels)
    with load(args, config) as engine:
        page = ChatPage(engine, limits, config.run.chat)
        show(page, args)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for an error that the user can fix, 130 for an answer that Ctrl-C ended."""
    args = parse_args(argv)
    setup_logging(rank=0)
    try:
        config = Config(args).validate(training=False)
        require_paths({"model": config.model}, config.source)
        return (talk if args.cli else serve)(args, config)
    except MiniGPT4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end(main())
