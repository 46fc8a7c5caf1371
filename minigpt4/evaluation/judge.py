"""A language model as judge, behind any OpenAI-compatible endpoint; each answer is paid for once.

Answers are kept in a JSON-lines file, under a hash of endpoint, model, messages (bytes of images included), temperature
and length: the same question again sends no request, and a killed evaluation resumes. The account's key is neither
logged nor written.
"""

import base64
import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
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
from minigpt4.common.run_folder import locked
from minigpt4.common.schemas import EndpointConfig
from minigpt4.common.utils import JsonLines, require_packages
from minigpt4.evaluation.limits import (
    NO_CONNECTION,
    TIME_OUT,
    Account,
    counted_client,
    estimated_tokens,
    fault_of,
    refused_parameter,
)

log = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "::1")
QUOTA_USED_UP = "insufficient_quota"
PATH = "/chat/completions"
SHOWN = 300
"""Characters of what a server says."""
SENT_AS_IT_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
"""Formats that every endpoint reads; others, and those that are to be turned, are sent as PNG."""
CUT, EMPTY, BROKEN_JSON, NO_TEXT = "cut at the length limit", "empty", "broken JSON", "no text"
"""Faults of replies, beside those of limits.py."""
ASKED_AGAIN = (EMPTY, BROKEN_JSON, NO_TEXT)
ENDS_RUN = {*range(300, 400), 401, 403, 404}
"""Status that the next question would get, too."""
MOST_FAULTS = 50
LENGTH_OPTIONS = ("max_tokens", "max_completion_tokens")


# The endpoint


@dataclass(frozen=True)
class JudgeEndpoint(EndpointConfig):
    """Where the judge is, and how it is asked.

    ConfigError for an invalid URL, or one that holds a password or a query.
    """

    option: str = "--judge-"
    """What stands before the names of fields where people set them, for errors."""

    def __post_init__(self) -> None:
        if "@" in self.url or "?" in self.url:
            raise self._fault(
                "url", f"give the key in the environment, not in the URL; see {self.name_of('key_variable')}"
            )
        wrong = self._fault("url", f"{self.url!r} is no URL such as http://localhost:8000/v1")
        try:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or " " in self.url:
                raise wrong
        except ValueError as error:  # of a port that is no number, for instance
            raise wrong from error
        if not self.model:
            raise self._fault("model", "name the model that the endpoint is to answer with")
        if self.timeout <= 0:
            raise self._fault("timeout", f"{self.timeout} must be above 0")
        if self.at_once < 1:
            raise self._fault("at_once", f"{self.at_once} must be at least 1")

    def name_of(self, field: str) -> str:
        """A field as people set it."""
        return self.option + (field.replace("_", "-") if self.option.startswith("--") else field)

    def _fault(self, field: str, text: str) -> ConfigError:
        return ConfigError(f"{self.name_of(field)}: {text}")

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
            raise ConfigError(f"{self.key_variable}: holds spaces or characters that no key has; set it again")
        return key or None


class Question(NamedTuple):
    """What the judge is asked."""

    text: str
    image: Path | None = None
    system: str = ""
    max_tokens: int | None = None
    """Of the answer; None: the endpoint's."""
    examples: tuple[tuple[str, str], ...] = ()
    """Turns before it: what was asked, and what a good answer is."""

    @property
    def words(self) -> str:
        """All that goes to the endpoint as text."""
        return "".join([self.system, *(turn for pair in self.examples for turn in pair), self.text])


class Reply(NamedTuple):
    """What came of a question that may fail alone."""

    text: str
    """As far as there is one."""
    fault: str = ""
    """Name of what went wrong: a constant of this module or of limits.py, `status 500`, or what `accepts` says."""
    detail: str = ""
    """Of the fault, for people."""
    tokens_in: int | None = None
    """As the endpoint counts them; None: it does not say."""
    tokens_out: int | None = None
    key: str = ""
    """Of the request: the same for the same one."""


Faults = Callable[[Question, Reply], str]
"""The name of what is wrong with a reply, empty for nothing."""


class RequestError(RunError):
    """No answer to one question; `ends_run`: nor will there be one to the next."""

    def __init__(self, text: str, fault: str, ends_run: bool = False) -> None:
        super().__init__(text)
        self.fault, self.ends_run = fault, ends_run


class Judge:
    """Answers from `endpoint`, kept in the JSON-lines file `cache`, which several judges may share.

    `ledger`: a file with a line for each request; `account` counts them with or without. ConfigError where `openai` is
    not installed, or where the endpoint's key or a file cannot be used.
    """

    def __init__(self, endpoint: JudgeEndpoint, cache: Path, ledger: Path | None = None) -> None:
        require_packages(endpoint.name_of("url"), "judge", "openai")
        import openai

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it has a line for every request
        self.endpoint, self._key, self._cache, self._lock = endpoint, endpoint.key(), cache, threading.Lock()
        self._options = {"max_tokens": endpoint.max_tokens, "temperature": endpoint.temperature}
        self.account = Account(endpoint, ledger)
        http = counted_client(
            self.account,
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
        with errors_as(ConfigError, f"{endpoint.name_of('cache')}: {cache} cannot be used"):
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("ab+") as file:
                file.seek(max(0, file.tell() - 1))
                if file.read() not in (b"", b"\n"):
                    file.write(b"\n")  # a line that a kill cut off ends here
        self._answers: dict[str, Reply] = {}
        self._read_cache()

    def _read_cache(self) -> None:
        for line in JsonLines(self._cache).read():
            key, text = line.get("key"), line.get("answer")
            if isinstance(key, str) and isinstance(text, str):
                tokens = [line.get(name) for name in ("tokens_in", "tokens_out")]
                self._answers[key] = Reply(text, "", "", *tokens, key)

    def ask_all(self, questions: Sequence[Question]) -> list[str]:
        """The answers in the order of the questions; equal ones are asked once.

        An answer is empty where the judge says nothing; it is asked again the next time. Ends at the first error:
        RunError, which names the way out, where the endpoint gives no answer; SampleError for an unreadable image.
        """
        answers = {question: answer.strip() for question, answer in self.ask_each(questions)}
        return [answers[question] for question in questions]

    def ask_each(self, questions: Sequence[Question]) -> Iterator[tuple[Question, str]]:
        """Each different question with its answer to the last blank, cut or not, as they arrive; errors as of
        `ask_all`."""
        with closing(self._replies(questions, lambda question, reply: "")) as replies:
            for question, reply in replies:
                if reply.detail:
                    raise RequestError(reply.detail, reply.fault)
                yield question, reply.text

    def try_each(
        self, questions: Sequence[Question], accepts: Callable[[Question, str], str] = lambda question, text: ""
    ) -> Iterator[tuple[Question, Reply]]:
        """Each different question with its reply, as they arrive; one that fails has a fault, and the others go on.

        Kept in the cache are whole answers that `accepts` finds no fault with, whose name it returns. RunError where no
        other question can be answered either: a refused key, no server, the cost limit, MOST_FAULTS in a row; and where
        another process asks with this cache.
        """
        replies, in_a_row = self._replies(questions, lambda one, own: own.fault or accepts(one, own.text)), 0
        with self._locked_cache(), closing(replies):
            self._read_cache()
            for question, reply in replies:
                in_a_row = in_a_row + 1 if reply.detail else 0
                yield question, reply
                if in_a_row >= MOST_FAULTS:
                    raise self._error(f"{in_a_row} questions in a row without answer, the last: {reply.detail}", "")

    @contextmanager
    def _locked_cache(self) -> Iterator[None]:
        try:
            lock = locked(self._cache)
        except OSError:  # a file system without locks
            lock = os.open(os.devnull, os.O_RDONLY)
        if lock is None:
            raise RunError(f"{self._cache}: is in use by another process; wait for it, or end it")
        try:
            yield
        finally:
            os.close(lock)

    def plan(self, questions: Sequence[Question], count: Callable[[str], int] = estimated_tokens) -> dict[str, Any]:
        """What `try_each` would send, nothing being sent: `requests`, `cached`, `tokens_in` by `count`, the bound
        `tokens_out`, `price` (None without prices) and the messages of two requests, `examples`."""
        keyed = [(question, self._request(question)) for question in dict.fromkeys(questions)]
        new = [(question, messages) for question, (key, messages) in keyed if key not in self._answers]
        tokens_in = sum(count(question.words) for question, _ in new)
        tokens_out = sum(question.max_tokens or self.endpoint.max_tokens for question, _ in new)
        return {
            "requests": len(new),
            "cached": len(keyed) - len(new),
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "price": self.account.price(tokens_in, tokens_out),
            "examples": [messages for _, messages in new[:2]],
        }

    def key_of(self, question: Question) -> str:
        """What `Reply.key` will be."""
        return self._request(question)[0]

    def _replies(self, questions: Sequence[Question], fault_of: Faults) -> Iterator[tuple[Question, Reply]]:
        different = list(dict.fromkeys(questions))
        with ThreadPool(self.endpoint.at_once) as threads:  # an error, or Ctrl-C, does not wait for requests under way
            pairs = threads.imap_unordered(lambda question: (question, self._reply(question, fault_of)), different)
            yield from tqdm(pairs, desc="judge", total=len(different), unit="question", disable=None)

    def _request(self, question: Question) -> tuple[str, list[dict[str, Any]]]:
        """Key and messages."""
        content: Any = question.text
        if question.image is not None:
            picture = {"type": "image_url", "image_url": {"url": data_url(question.image)}}
            content = [{"type": "text", "text": question.text}, picture]
        system = [{"role": "system", "content": question.system}] if question.system else []
        roles = ("user", "assistant")
        turns = [
            {"role": r, "content": text} for pair in question.examples for r, text in zip(roles, pair, strict=True)
        ]
        messages = [*system, *turns, {"role": "user", "content": content}]
        one = self.endpoint
        whole = [one.address, one.model, question.max_tokens or one.max_tokens, one.temperature, messages]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest(), messages

    def _reply(self, question: Question, fault_of: Faults) -> Reply:
        """The reply, from the cache or the endpoint, and with the fault that `fault_of` finds; without one it is kept.

        What is empty or cannot be read is asked once more. RequestError where that ends the run.
        """
        key, messages = self._request(question)
        if key in self._answers and not fault_of(question, self._answers[key]):
            return self._answers[key]
        for again in (True, False):
            try:
                reply = self._complete(question, messages)._replace(key=key)
                reply = reply._replace(fault=fault_of(question, reply) if reply.text.strip() else reply.fault or EMPTY)
            except RequestError as error:
                if error.ends_run:
                    raise
                reply = Reply("", error.fault, str(error), key=key)
            if reply.fault and (not reply.detail or reply.fault in ASKED_AGAIN):
                self.account.note(reply.fault)  # limits.py counts those that the network or a status shows
            if not (again and reply.fault in ASKED_AGAIN):
                break
        if not reply.fault:
            self._keep(question, reply)
        return reply

    def _keep(self, question: Question, reply: Reply) -> None:
        """One line in one write; RunError if the disk refuses, before more is paid for."""
        record = {"key": reply.key, "answer": reply.text, "model": self.endpoint.model, "question": question.text}
        record |= {name: own for name in ("tokens_in", "tokens_out") if (own := getattr(reply, name)) is not None}
        line = json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock, errors_as(RunError, f"{self._cache}: answers cannot be kept"):
            with self._cache.open("ab", buffering=0) as file:
                if file.write(line) < len(line):
                    raise RunError(f"{self._cache}: answers cannot be kept (the disk is full)")
            self._answers[reply.key] = reply

    def _complete(self, question: Question, messages: list[dict[str, Any]]) -> Reply:
        """What the model answers; empty where it declines, or has used up its tokens for thought; RequestError."""
        import openai

        tried = f"asked up to {self.endpoint.attempts} times, and what was answered before is kept"
        most = question.max_tokens or self.endpoint.max_tokens
        size = estimated_tokens(question.words)
        while True:
            names, answer = self._options, None
            options = {name: most if name in LENGTH_OPTIONS else value for name, value in names.items()}
            try:
                with self.account.asking(size, most):  # until its tokens are counted: their price stays reserved
                    answer = self._create(messages=messages, **options)
                    choice, usage = answer.choices[0], getattr(answer, "usage", None)
                    text = choice.message.content or ""
                    if not isinstance(text, str):
                        raise TypeError("it is no text")
                    used = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
                    tokens = [own if isinstance(own, int) else None for own in used]
                    known = [size, estimated_tokens(text)] if None in tokens else tokens
                    self.account.note(tokens_in=known[0], tokens_out=known[1])
            except openai.APIStatusError as error:
                if error.status_code != 400 or not self._adapts(refused_parameter(error), names):
                    fatal = error.status_code in ENDS_RUN or error.code == QUOTA_USED_UP
                    fault = f"status {error.status_code}"
                    raise self._error(self._reason(error, tried), fault, fatal) from None  # its text may repeat the key
                continue
            except openai.APITimeoutError as error:
                what = f"no answer within {self.endpoint.timeout:g} s ({self.endpoint.name_of('timeout')})"
                raise self._error(f"{what}; {tried}", TIME_OUT) from error
            except openai.APIConnectionError as error:
                cause, url = error.__cause__, self.endpoint.name_of("url")
                what, fault = f"no connection, or one that broke ({cause}); check {url}", fault_of(cause)
                raise self._error(f"{what}; {tried}", fault, fault == NO_CONNECTION) from error
            except (ValueError, AttributeError, IndexError, TypeError) as error:  # openai checks nothing that it gets
                fault = BROKEN_JSON if isinstance(error, ValueError) or isinstance(answer, str) else NO_TEXT
                what = f"no choices[0].message.content in its answer {answer!r:.{SHOWN}} ({error})"
                way_out = f"is it an OpenAI-compatible chat endpoint? Check {self.endpoint.name_of('url')}"
                raise self._error(f"{what}, asked twice; what was answered before is kept; {way_out}", fault) from error
            cut = getattr(choice, "finish_reason", None) == "length"
            if cut:
                log.warning("An answer of %s is cut off at %d tokens", self.endpoint.model, most)
            return Reply(text, CUT if cut else "", "", *tokens)

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
        status, model, url = error.status_code, self.endpoint.model, self.endpoint.name_of("url")
        if 300 <= status < 400:
            return f"sends requests on to {error.response.headers.get('Location')}; give that as {url}"
        key = f"the key in {self.endpoint.key_variable} is not {'accepted' if self._key else 'set'}"
        ways_out = {
            400: f"the model {model!r} refuses the request; if it has images, the model must read them",
            401: key,
            403: key,
            404: f"check {url}, which most often ends in /v1, and whether the server has the model {model!r}",
        }
        return f"status {status} ({said}); {ways_out.get(status, tried)}"

    def _error(self, what: str, fault: str, ends_run: bool = False) -> RequestError:
        return RequestError(f"judge {self.endpoint.address}: {what}", fault, ends_run)


def _do_not_wait_for_quota(response: Any) -> None:
    """Status 429 also says that the account has no money left, which openai would ask again for."""
    if response.status_code == 429:
        response.read()
        if QUOTA_USED_UP in response.text:
            response.headers["x-should-retry"] = "false"


def data_url(image: Path) -> str:
    """An image file as a `data:` URL; SampleError if it cannot be read."""
    from minigpt4.processors import open_image  # loads torch, which texts do not need

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
