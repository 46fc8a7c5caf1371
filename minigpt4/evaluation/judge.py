"""A language model as judge, behind any OpenAI-compatible endpoint, with answers that are paid for once.

Answers are kept in a JSON-lines file, under a hash of endpoint, model, messages (the bytes of images included),
temperature and length: whoever asks the same again gets the same answer without a request, and a killed evaluation
goes on. The key of the account is neither logged nor written.
"""

import argparse
import base64
import hashlib
import io
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ExifTags import Base as ExifTag
from tqdm import tqdm

from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.json_lines import JsonLines
from minigpt4.evaluation.judge_client import KEY_VARIABLE, JudgeClient, JudgeEndpoint
from minigpt4.processors.images import open_image

SENT_AS_IT_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
"""Formats that every endpoint reads; others, and those that are to be turned, are sent as PNG."""
AT_ONCE = 8
"""Requests under way at a time."""


@dataclass(frozen=True)
class Question:
    """What the judge is asked."""

    text: str
    image: Path | None = None
    system: str = ""


class Judge:
    """Answers from `endpoint`, kept in the file `cache`, which several judges may share.

    Raises:
        ConfigError: the endpoint's values or the file cannot be used.
    """

    def __init__(self, endpoint: JudgeEndpoint, cache: Path) -> None:
        self.endpoint = endpoint
        self.answers = AnswerCache(cache)
        self._client = JudgeClient(endpoint)

    def ask_all(self, questions: Sequence[Question], *, at_once: int = AT_ONCE, title: str = "judge") -> list[str]:
        """The answers in the order of the questions; equal ones are asked once.

        An answer is empty where the judge says nothing, which is asked again the next time. The first error ends it.

        Raises:
            RunError: the endpoint gives no answer; the text says what to do.
            SampleError: an image cannot be read.
        """
        different = list(dict.fromkeys(questions))
        with ThreadPool(at_once) as threads:  # an error, or Ctrl-C, does not wait for requests under way
            pairs = threads.imap_unordered(lambda question: (question, self._answer(question)), different)
            answers = dict(tqdm(pairs, desc=title, total=len(different), unit="question", disable=None))
        return [answers[question] for question in questions]

    def _answer(self, question: Question) -> str:
        messages = _messages(question)
        key = self._key(messages)
        answer = self.answers.get(key)
        if answer is None:
            answer = self._client.complete(messages)
            if answer:
                self.answers.put(key, answer, {"model": self.endpoint.model, "question": question.text})
        return answer

    def _key(self, messages: list[dict[str, Any]]) -> str:
        endpoint = self.endpoint
        whole = [endpoint.address, endpoint.model, endpoint.max_tokens, endpoint.temperature, messages]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


class AnswerCache:
    """Answers by key in a JSON-lines file; a line that a kill cut off is passed over. For several threads.

    Raises:
        ConfigError: the file cannot be read or made.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                size = file.tell()
                file.seek(max(0, size - 1))
                if file.read() not in (b"", b"\n"):
                    file.write(b"\n")  # the torn line ends here
            records = JsonLines(path).read()
        except OSError as error:
            raise ConfigError(f"--judge-cache: {path} cannot be used ({error.strerror})") from error
        self._answers = {
            record["key"]: record["answer"]
            for record in records
            if isinstance(record.get("key"), str) and isinstance(record.get("answer"), str)
        }

    def get(self, key: str) -> str | None:
        return self._answers.get(key)

    def put(self, key: str, answer: str, about: Mapping[str, str]) -> None:
        """Keep an answer, as one line in one write; RunError if the disk refuses, before more is paid for."""
        line = json.dumps({"key": key, "answer": answer, **about}, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock:
            try:
                with self._path.open("ab", buffering=0) as file:
                    written = file.write(line)
            except OSError as error:
                raise RunError(f"{self._path}: answers cannot be kept ({error.strerror})") from error
            if written < len(line):
                raise RunError(f"{self._path}: answers cannot be kept (the disk is full)")
            self._answers[key] = answer


def _messages(question: Question) -> list[dict[str, Any]]:
    content: Any = question.text
    if question.image is not None:
        picture = {"type": "image_url", "image_url": {"url": data_url(question.image)}}
        content = [{"type": "text", "text": question.text}, picture]
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": content}]


def data_url(image: Path) -> str:
    """An image file as a `data:` URL; SampleError if it cannot be read."""
    picture = open_image(image)
    try:
        with Image.open(image) as file:
            kind = SENT_AS_IT_IS.get(file.format) if file.getexif().get(ExifTag.Orientation, 1) == 1 else None
    except Exception:  # its metadata are damaged, and the pixels are not
        kind = None
    if kind is not None:
        return f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"
    png = io.BytesIO()
    picture.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def add_judge_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options of a command that asks a judge; `judge_of` reads them."""
    group = parser.add_argument_group("judge", "any OpenAI-compatible endpoint, of a service or of this machine")
    group.add_argument("--judge-url", required=required, metavar="URL", help="such as http://localhost:8000/v1")
    group.add_argument("--judge-model", required=required, metavar="NAME", help="model that the endpoint answers with")
    group.add_argument(
        "--judge-key-variable",
        default=KEY_VARIABLE,
        metavar="NAME",
        help=f"environment variable with the key, if the endpoint wants one ({KEY_VARIABLE})",
    )
    group.add_argument(
        "--judge-cache", type=Path, default=Path("output/judge_answers.jsonl"), metavar="FILE", help="answers so far"
    )
    group.add_argument("--judge-timeout", type=float, default=120.0, metavar="SECONDS", help="for one answer (120)")
    group.add_argument("--judge-at-once", type=int, default=AT_ONCE, metavar="N", help=f"requests at once ({AT_ONCE})")


def judge_of(args: argparse.Namespace) -> Judge | None:
    """The judge of a command line, or None without `--judge-url`; ConfigError for options that cannot be."""
    if args.judge_at_once < 1:
        raise ConfigError(f"--judge-at-once: {args.judge_at_once} must be at least 1")
    if not args.judge_url:
        return None
    endpoint = JudgeEndpoint(
        args.judge_url, args.judge_model or "", key_variable=args.judge_key_variable, timeout=args.judge_timeout
    )
    return Judge(endpoint, args.judge_cache)
