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
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ExifTags import Base as ExifTag
from tqdm import tqdm

from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.json_lines import JsonLines
from minigpt4.evaluation.judge_http import KEY_VARIABLE, JudgeEndpoint, JudgeServer, Refused
from minigpt4.processors.images import open_image

log = logging.getLogger(__name__)

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
        self._server = JudgeServer(endpoint)
        self._length_field = "max_tokens"
        self._has_temperature = True

    def ask(self, text: str, image: Path | None = None, system: str = "") -> str:
        """The answer to one question; empty where the judge says nothing, which is asked again the next time.

        Raises:
            RunError: the endpoint gives no answer; the text says what to do.
            SampleError: the image cannot be read.
        """
        return self._answer(Question(text, image, system))

    def ask_all(self, questions: Sequence[Question], *, at_once: int = AT_ONCE, title: str = "judge") -> list[str]:
        """The answers in the order of the questions; equal ones are asked once. The first error ends it."""
        self._server.start()
        different = list(dict.fromkeys(questions))
        with (
            tqdm(total=len(different), desc=title, unit="question", disable=None) as bar,
            ThreadPoolExecutor(max_workers=at_once) as threads,
        ):
            tasks = [threads.submit(self._answer, question) for question in different]
            for task in tasks:
                task.add_done_callback(lambda _: bar.update())
            try:
                wait(tasks, return_when=FIRST_EXCEPTION)
                failed = next((error for task in tasks if task.done() and (error := task.exception())), None)
                if failed is not None:
                    raise failed
            except BaseException:
                self._server.stop()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        answers = {question: task.result() for question, task in zip(different, tasks, strict=True)}
        return [answers[question] for question in questions]

    def _answer(self, question: Question) -> str:
        messages = _messages(question)
        key = self._key(messages)
        answer = self.answers.get(key)
        if answer is None:
            answer = self._new_answer(messages)
            if answer:
                self.answers.put(key, answer, {"model": self.endpoint.model, "question": question.text})
        return answer

    def _key(self, messages: list[dict[str, Any]]) -> str:
        endpoint = self.endpoint
        whole = [endpoint.address, endpoint.model, endpoint.max_tokens, endpoint.temperature, messages]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def _new_answer(self, messages: list[dict[str, Any]]) -> str:
        while True:
            payload = {"model": self.endpoint.model, "messages": messages, self._length_field: self.endpoint.max_tokens}
            if self._has_temperature:
                payload["temperature"] = self.endpoint.temperature
            try:
                return self._text_of(self._server.post(payload))
            except Refused as refusal:
                self._adapt(refusal, payload)

    def _adapt(self, refusal: Refused, payload: Mapping[str, Any]) -> None:
        """Newer models call the length otherwise, and some take no temperature; RunError for any other complaint."""
        if refusal.field == "max_tokens" and "max_tokens" in payload:
            self._length_field = "max_completion_tokens"
        elif refusal.field == "temperature" and "temperature" in payload:
            if self._has_temperature:
                log.warning("%s takes no temperature; its answers may differ from run to run", self.endpoint.model)
            self._has_temperature = False
        else:
            raise RunError(
                f"judge {self.endpoint.address}: the model {self.endpoint.model!r} refuses the request ({refusal}); if "
                "it has images, the model must read them"
            ) from refusal

    def _text_of(self, content: Mapping[str, Any]) -> str:
        """The answer's text, which is empty where the judge declines or has used up its tokens for thought."""
        try:
            choice = content["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise self._strange(content) from error
        if not isinstance(text, str | None):
            raise self._strange(content)
        if choice.get("finish_reason") == "length":
            log.warning("An answer of %s is cut off at %d tokens", self.endpoint.model, self.endpoint.max_tokens)
        return (text or "").strip()

    def _strange(self, content: Mapping[str, Any]) -> RunError:
        shown = json.dumps(content)[:200]
        return RunError(
            f"judge {self.endpoint.address}: no choices[0].message.content in its answer {shown}; is it an "
            "OpenAI-compatible chat endpoint?"
        )


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

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> str | None:
        return self._answers.get(key)

    def put(self, key: str, answer: str, about: Mapping[str, str]) -> None:
        """Keep an answer, as one line in one write; RunError if the disk refuses, before more is paid for."""
        line = json.dumps({"key": key, "answer": answer, **about}, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock:
            try:
                file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                try:
                    written = os.write(file, line)
                finally:
                    os.close(file)
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
    with Image.open(image) as file:
        kind, is_upright = SENT_AS_IT_IS.get(file.format), file.getexif().get(ExifTag.Orientation, 1) == 1
    if kind is not None and is_upright:
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
