"""A language model as judge, behind any OpenAI-compatible endpoint; each answer is paid for once.

Answers are kept in a JSON-lines file, under a hash of endpoint, model, messages (bytes of images included), temperature
and length: the same question again sends no request, and a killed evaluation resumes. The account's key is neither
logged nor written.
"""

import argparse
import base64
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image
from PIL.ExifTags import Base as ExifTag
from tqdm import tqdm

from minigpt4.common.errors import ConfigError, RunError, errors_as
from minigpt4.common.utils import JsonLines
from minigpt4.processors import open_image

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
QUOTA_USED_UP = "insufficient_quota"
PATH = "/chat/completions"
SHOWN = 300
"""Characters of what a server says."""
SENT_AS_IT_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
"""Formats that every endpoint reads; others, and those that are to be turned, are sent as PNG."""
AT_ONCE = 8
THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL | re.IGNORECASE)
WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
FIRST = re.compile(r"\W*(yes|no|yeah|yep|nope)\b", re.IGNORECASE)
NUMBERED = re.compile(r"\W*(?:caption|line|number)?\W*(\d+)\W+(yes|no)\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")
UNSURE = re.compile(
    r"\b(?:not (?:sure|certain|clear|possible|able)|unsure|unclear|cannot (?:tell|say|determine)|"
    r"(?:can't|can not|don't|do not) (?:tell|say|know|determine)|maybe|perhaps|possibly|might|may be|sorry)\b"
)
SHOWS = r"(?:show|have|has|contain|feature|include|depict|see)s?"
DENIAL = re.compile(
    rf"\bthere (?:is|are|was|were)(?: no| not|n't)\b|\bthere's (?:no|not)\b|\b{SHOWS} (?:no|not)\b|"
    rf"\b(?:does not|doesn't|do not|don't|cannot|can't|can not) (?:\w+ )?(?:{SHOWS}|appear)\b"
)
AFFIRMATION = re.compile(
    rf"\bthere(?: is| are|'s)\b|\bi (?:can )?see\b|\b(?:image|picture|photo|scene) (?:\w+ )?{SHOWS}\b"
)


# The endpoint


@dataclass(frozen=True)
class JudgeEndpoint:
    """Where the judge is, and how it is asked.

    `url` is that of a server (`http://localhost:8000`), of its API (`https://api.openai.com/v1`) or of
    `.../chat/completions` itself. ConfigError for an invalid URL, or one that holds a password or a query.
    """

    url: str
    model: str
    key_variable: str = KEY_VARIABLE
    """Environment variable with the key; unset: requests carry none, which is right for local servers."""

    timeout: float = 120.0
    """Seconds without a sign of the server."""

    attempts: int = 6
    max_tokens: int = 1024
    """Of one answer."""

    temperature: float = 0.0
    at_once: int = AT_ONCE
    """Requests under way at a time."""

    def __post_init__(self) -> None:
        if "@" in self.url or "?" in self.url:
            raise ConfigError("--judge-url: give the key in the environment, not in the URL; see --judge-key-variable")
        wrong = ConfigError(f"--judge-url: {self.url!r} is no URL such as http://localhost:8000/v1")
        try:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or " " in self.url:
                raise wrong
        except ValueError as error:  # of a port that is no number, for instance
            raise wrong from error
        if not self.model:
            raise ConfigError("--judge-model: name the model that the endpoint is to answer with")
        if self.timeout <= 0:
            raise ConfigError(f"--judge-timeout: {self.timeout} must be above 0")
        if self.at_once < 1:
            raise ConfigError(f"--judge-at-once: {self.at_once} must be at least 1")

    @property
    def address(self) -> str:
        """The URL of requests."""
        url = self.url.rstrip("/")
        if url.endswith(PATH):
            return url
        return f"{url}{PATH}" if urlsplit(url).path else f"{url}/v1{PATH}"

    def key(self) -> str | None:
        """The key, or None; ConfigError, which does not show it, for one that cannot be sent."""
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{self.key_variable}: holds spaces or signs that no key has; set it again")
        return key or None


class Question(NamedTuple):
    """What the judge is asked."""

    text: str
    image: Path | None = None
    system: str = ""


class Judge:
    """Answers from `endpoint`, kept in the JSON-lines file `cache`, which several judges may share.

    ConfigError where `openai` is not installed, or where the endpoint's key or the file cannot be used.
    """

    def __init__(self, endpoint: JudgeEndpoint, cache: Path) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ConfigError('--judge-url: a judge needs the package openai; pip install -e ".[judge]" brings it')
        import openai

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it has a line for every request
        self.endpoint, self._key, self._cache, self._lock = endpoint, endpoint.key(), cache, threading.Lock()
        self._options = {"max_tokens": endpoint.max_tokens, "temperature": endpoint.temperature}
        http = openai.DefaultHttpxClient(
            follow_redirects=False,  # the key would go to another server
            trust_env=urlsplit(endpoint.url).hostname not in LOOPBACK,  # no proxy leads to this machine
            event_hooks={"response": [_do_not_wait_for_quota]},
        )
        client = openai.OpenAI(
            base_url=endpoint.address.removesuffix(PATH),
            api_key=self._key or "none",  # without one, openai looks for OPENAI_API_KEY
            timeout=endpoint.timeout,
            max_retries=endpoint.attempts - 1,
            http_client=http,
        )
        headers = {} if self._key else {"Authorization": openai.Omit()}
        self._create = partial(client.chat.completions.create, model=endpoint.model, extra_headers=headers)
        with errors_as(ConfigError, f"--judge-cache: {cache} cannot be used"):
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("ab+") as file:
                file.seek(max(0, file.tell() - 1))
                if file.read() not in (b"", b"\n"):
                    file.write(b"\n")  # a line that a kill cut off ends here
        kept = [(record.get("key"), record.get("answer")) for record in JsonLines(cache).read()]
        self._answers = {key: text for key, text in kept if isinstance(key, str) and isinstance(text, str)}

    def ask_all(self, questions: Sequence[Question]) -> list[str]:
        """The answers in the order of the questions; equal ones are asked once.

        An answer is empty where the judge says nothing; it is asked again the next time. Ends at the first error:
        RunError, which names the way out, where the endpoint gives no answer; SampleError for an unreadable image.
        """
        answers = {question: answer.strip() for question, answer in self.ask_each(questions)}
        return [answers[question] for question in questions]

    def ask_each(self, questions: Sequence[Question]) -> Iterator[tuple[Question, str]]:
        """Each different question with its answer to the last blank, as they arrive; errors as of `ask_all`."""
        different = list(dict.fromkeys(questions))
        with ThreadPool(self.endpoint.at_once) as threads:  # an error, or Ctrl-C, does not wait for requests under way
            pairs = threads.imap_unordered(lambda question: (question, self._answer(question)), different)
            yield from tqdm(pairs, desc="judge", total=len(different), unit="question", disable=None)

    def _answer(self, question: Question) -> str:
        content: Any = question.text
        if question.image is not None:
            picture = {"type": "image_url", "image_url": {"url": data_url(question.image)}}
            content = [{"type": "text", "text": question.text}, picture]
        system = [{"role": "system", "content": question.system}] if question.system else []
        messages = [*system, {"role": "user", "content": content}]
        one = self.endpoint
        whole = [one.address, one.model, one.max_tokens, one.temperature, messages]
        key = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
        if key in self._answers:
            return self._answers[key]
        answer = self._complete(messages)
        if answer.strip():
            self._keep({"key": key, "answer": answer, "model": one.model, "question": question.text})
        return answer

    def _keep(self, record: dict[str, str]) -> None:
        """One line in one write; RunError if the disk refuses, before more is paid for."""
        line = json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock, errors_as(RunError, f"{self._cache}: answers cannot be kept"):
            with self._cache.open("ab", buffering=0) as file:
                if file.write(line) < len(line):
                    raise RunError(f"{self._cache}: answers cannot be kept (the disk is full)")
            self._answers[record["key"]] = record["answer"]

    def _complete(self, messages: list[dict[str, Any]]) -> str:
        """The text that the model answers with; empty where it declines, or has used up its tokens for thought."""
        import openai

        tried = f"asked up to {self.endpoint.attempts} times, and what was answered before is kept"
        while True:
            options, answer = self._options, None
            try:
                answer = self._create(messages=messages, **options)
                choice = answer.choices[0]
                text = choice.message.content or ""
                if not isinstance(text, str):
                    raise TypeError("it is no text")
            except openai.APIStatusError as error:
                if error.status_code != 400 or not self._adapts(error.param, options):
                    raise self._error(self._reason(error, tried)) from None  # its text may repeat the key
                continue
            except openai.APITimeoutError as error:
                what = f"no answer within {self.endpoint.timeout:g} s (--judge-timeout)"
                raise self._error(f"{what}; {tried}") from error
            except openai.APIConnectionError as error:
                what = f"no connection, or one that broke ({error.__cause__}); check --judge-url"
                raise self._error(f"{what}; {tried}") from error
            except (ValueError, AttributeError, IndexError, TypeError) as error:  # openai checks nothing that it gets
                what = f"no choices[0].message.content in its answer {answer!r:.{SHOWN}} ({error})"
                raise self._error(f"{what}; is it an OpenAI-compatible chat endpoint? Check --judge-url") from error
            if getattr(choice, "finish_reason", None) == "length":
                log.warning("An answer of %s is cut off at %d tokens", self.endpoint.model, self.endpoint.max_tokens)
            return text

    def _adapts(self, refused: str | None, options: Mapping[str, Any]) -> bool:
        """Newer models have another name for the length, and some take no temperature."""
        if refused not in options or refused == "max_completion_tokens":
            return False
        others = {name: value for name, value in self._options.items() if name != refused}
        if refused == "max_tokens":
            others["max_completion_tokens"] = self.endpoint.max_tokens
        else:
            log.warning("%s takes no temperature; its answers may differ from run to run", self.endpoint.model)
        self._options = others  # a new one, as other threads read the old
        return True

    def _reason(self, error: Any, tried: str) -> str:
        """What an `openai.APIStatusError` means, without the key."""
        said = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
        said = " ".join(str(said or error.response.reason_phrase).split())
        said = (said.replace(self._key, "***") if self._key else said)[:SHOWN]
        if error.code == QUOTA_USED_UP:
            return f"the account's quota is used up ({said})"
        status, model = error.status_code, self.endpoint.model
        if 300 <= status < 400:
            return f"sends requests on to {error.response.headers.get('Location')}; give that as --judge-url"
        key = f"the key in {self.endpoint.key_variable} is not {'accepted' if self._key else 'set'}"
        ways_out = {
            400: f"the model {model!r} refuses the request; if it has images, the model must read them",
            401: key,
            403: key,
            404: f"check --judge-url, which most often ends in /v1, and whether the server has the model {model!r}",
        }
        return f"status {status} ({said}); {ways_out.get(status, tried)}"

    def _error(self, what: str) -> RunError:
        return RunError(f"judge {self.endpoint.address}: {what}")


def _do_not_wait_for_quota(response: Any) -> None:
    """Status 429 also says that the account has no money left, which openai would ask again for."""
    if response.status_code == 429:
        response.read()
        if QUOTA_USED_UP in response.text:
            response.headers["x-should-retry"] = "false"


def data_url(image: Path) -> str:
    """An image file as a `data:` URL; SampleError if it cannot be read."""
    picture = open_image(image)
    try:
        with Image.open(image) as file:
            kind = SENT_AS_IT_IS.get(file.format) if file.getexif().get(ExifTag.Orientation, 1) == 1 else None
    except Exception:  # its metadata are damaged, and the pixels are not
        kind = None
    content = image.read_bytes()
    if kind is None:
        picture.save(png := io.BytesIO(), "PNG")
        kind, content = "image/png", png.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# Command lines


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


def judge_of(args: argparse.Namespace, **changes: Any) -> Judge | None:
    """The judge of a command line, or None without `--judge-url`; `changes` are fields of `JudgeEndpoint` that have no
    option. ConfigError for options that cannot be."""
    if not args.judge_url:
        return None
    settings = {name: getattr(args, f"judge_{name}") for name in ("key_variable", "timeout", "at_once")}
    return Judge(JudgeEndpoint(args.judge_url, args.judge_model or "", **settings, **changes), args.judge_cache)


# Yes or no in what people and models write; what is neither is None


def yes_no(answer: str) -> bool | None:
    """Whether an answer says yes.

    By its first word; else by the one of `yes` and `no` that its first sentence holds; else by a statement such as
    `there is no dog` or `I see a dog`. None for what is unsure, contradicts itself or speaks of other things.
    """
    answer = without_thought(answer).replace("\u2019", "'")
    if first := FIRST.match(answer):
        return first[1].lower().startswith("y")
    sentence = SENTENCE_END.split(answer, maxsplit=1)[0].lower()
    if UNSURE.search(sentence):
        return None
    said = set(WORD.findall(sentence))
    if DENIAL.search(sentence):
        return None if "yes" in said else False
    affirms = AFFIRMATION.search(sentence) is not None
    if len(said) == 1:
        return True if said == {"yes"} else None if affirms else False
    return True if not said and affirms else None


def yes_no_lines(answer: str, count: int) -> list[bool] | None:
    """`count` answers, one a line as `1. yes`, as `yes`, or all in one line; None unless there are exactly so many.

    Numbered lines may have words of explanation behind them, and any order.
    """
    lines = [line for line in without_thought(answer).splitlines() if line.strip()]
    numbered = [(int(found[1]), found[2]) for line in lines if (found := NUMBERED.match(line))]
    if len(numbered) > 1 or count == 1 == len(numbered):
        by_number = dict(numbered)
        whole = len(numbered) == len(by_number) and by_number.keys() == set(range(1, count + 1))
        return _are_yes([by_number[number] for number in range(1, count + 1)]) if whole else None
    plain = [found[1] for line in lines if (found := re.match(r"\W*(yes|no)\b", line, re.IGNORECASE))]
    words = plain if len(plain) == count else WORD.findall(without_thought(answer))
    return _are_yes(words) if len(words) == count else None


def without_thought(answer: str) -> str:
    """The answer of a model that thinks aloud first."""
    return THOUGHT.sub("", answer).strip()


def _are_yes(words: Sequence[str]) -> list[bool]:
    return [word.lower() == "yes" for word in words]
