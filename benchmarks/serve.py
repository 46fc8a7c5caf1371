"""A server that several clients ask at once against one that is asked by one client at a time: throughput and waiting.

    python benchmarks/serve.py --images data/mini/flickr30k/flickr30k-images --write docs/performance.md
    python benchmarks/serve.py --url http://localhost:8000/v1 --model stage2 --images photos   # one that runs already
Starts `serve.py` on the configuration, asks in streams by the official client, both ways in turn against the same
server, and prints a Markdown section. Every request shows an image that the server has not seen, so that encoding it
counts. The key, if the server wants one, stands in MINIGPT4_API_KEY.
"""

import argparse
import base64
import io
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
from command import measured, parser_of, section
from PIL import Image
from tables import REPOSITORY, environment, in_turn

from minigpt4.common.errors import ConfigError, RunError

KEY = os.environ.get("MINIGPT4_API_KEY", "none")
LISTENING = re.compile(r"Listening on (\S+);")


@dataclass(frozen=True)
class Answered:
    """One request."""

    first: float
    """Seconds to the first words."""
    seconds: float
    """To the end."""
    tokens: int


@dataclass(frozen=True)
class Round:
    """All requests, one way."""

    answers: list[Answered]
    seconds: float

    @property
    def requests_per_second(self) -> float:
        """Throughput."""
        return len(self.answers) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens said, of all answers together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--cfg-path", default="eval_configs/mini_eval.yaml", help="YAML file of the server's model")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="values over the file's")
    parser.add_argument("--url", help="a server that runs already, http://localhost:8000/v1")
    parser.add_argument("--model", help="checkpoint to ask (the server's first)")
    parser.add_argument("--images", type=Path, required=True, help="folder with images to ask about")
    parser.add_argument("--prompt", default="Describe this image in detail.", help="question")
    parser.add_argument("--requests", type=int, default=32, help="requests of each round (32)")
    parser.add_argument("--clients", type=int, default=8, help="clients at once (8)")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (64)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds of each way, in turn (1)")
    return parser.parse_args(argv)


@contextmanager
def running(args: argparse.Namespace) -> Iterator[str]:
    """The URL of a server; one that is started here ends with the block."""
    if args.url:
        yield args.url
        return
    command = [sys.executable, str(REPOSITORY / "serve.py"), "--cfg-path", args.cfg_path, "--port", "0"]
    command += ["--max-rows", str(args.clients), *(["--options", *args.options] if args.options else [])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    log = []
    try:
        for line in process.stderr:
            log.append(line)
            if found := LISTENING.search(line):
                break
        else:
            raise RunError(f"{' '.join(command)} failed:\n{''.join(log[-20:])}")
        with ThreadPoolExecutor(1) as reader:
            reader.submit(process.stderr.read)  # a full pipe would stop the server
            yield f"{found[1]}/v1"
            process.terminate()
    finally:
        process.kill()
        process.wait()


def measure(args: argparse.Namespace, folder: Path) -> str:
    """The Markdown section."""
    if min(args.requests, args.repeats) < 1 or args.clients < 2:
        raise ConfigError("it takes two clients, one request and one round at least")
    files = sorted(path for path in args.images.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise ConfigError(f"--images: {args.images} holds no .jpg or .png")
    rounds: dict[int, list[Round]] = {1: [], args.clients: []}
    with running(args) as url, openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        model = args.model or client.models.list().data[0].id
        ask(client, model, args, fresh(files[0], -1))
        for turn, clients in enumerate(in_turn(rounds, args.repeats)):
            urls = [fresh(files[n % len(files)], turn * args.requests + n) for n in range(args.requests)]
            rounds[clients].append(asked(client, model, args, urls, clients))
            print(f"{clients} clients: {rounds[clients][-1].seconds:.1f} s", file=sys.stderr)
    subject = "a running server" if args.url else f"`{Path(args.cfg_path).name}`"
    alone, together = (statistics.median(one.requests_per_second for one in way) for way in rounds.values())
    text = (
        f"`serve.py` on {subject}: {args.requests} requests with an image each, by {args.clients} clients at once "
        f"against one client at a time, at most {args.max_tokens} tokens, greedy, streamed; rounds of each way: "
        f"{args.repeats}, in turn, against the same server. Decoding and encoding of images and HTTP are in all times; "
        f"the clients run on the same machine. {args.clients} clients at once get {together / alone:.2f} times the "
        "requests a second of one at a time."
    )
    head = ("clients", "requests/s", "tokens/s", "latency, median, s", "95%, s", "first words, median, s", "95%, s")
    rows = [[str(clients), *_numbers(way)] for clients, way in rounds.items()]
    return section(args, "serve", "## Many clients at once", text, head, rows)


def fresh(file: Path, number: int) -> str:
    """The image with two grey levels of its own, which no earlier request had, as a data URL."""
    image = Image.open(file).convert("RGB")
    for x, value in enumerate(divmod(number % 65536, 256)):
        image.paste((value,) * 3, (8 * x, 0, 8 * x + 8, 8))  # large enough to outlive the resizing
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asked(client: openai.OpenAI, model: str, args: argparse.Namespace, urls: Sequence[str], clients: int) -> Round:
    """A request for each image, so many at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda url: ask(client, model, args, url), urls))
    return Round(answers, time.perf_counter() - start)


def ask(client: openai.OpenAI, model: str, args: argparse.Namespace, url: str) -> Answered:
    """One request, greedy and streamed."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": args.prompt}]
    start, first, tokens = time.perf_counter(), None, 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    seconds = time.perf_counter() - start
    return Answered(seconds if first is None else first, seconds, tokens)


def _numbers(rounds: Sequence[Round]) -> list[str]:
    answers = [answer for one in rounds for answer in one.answers]
    numbers = [
        statistics.median(getattr(one, f"{what}_per_second") for one in rounds) for what in ("requests", "tokens")
    ]
    for values in ([answer.seconds for answer in answers], [answer.first for answer in answers]):
        numbers += [statistics.median(values), np.percentile(values, 95, method="inverted_cdf")]
    return [f"{number:.2f}" for number in numbers]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    return measured(parse_args(argv), "serve", measure)


if __name__ == "__main__":
    sys.exit(main())
