"""The judge against a real server: faults, kept answers, the key; yes and no."""

import base64
import io
import json
import logging
import sys
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError, RunError, SampleError
from minigpt4.evaluation import limits
from minigpt4.evaluation.judge import BROKEN_JSON, CUT, EMPTY, Judge, JudgeEndpoint, Question
from minigpt4.evaluation.limits import BROKEN_CONNECTION, TIME_OUT
from minigpt4.evaluation.yes_no import yes_no, yes_no_lines

KEY = "sk-very-secret"
SOON = {"Retry-After": "0.01"}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def make(chat_server, tmp_path):
    """`make(**changes)`: a judge on this machine."""

    def make(cache: str = "answers.jsonl", ledger: Path | None = None, **changes) -> Judge:
        values = {"url": chat_server.url, "model": "tiny-judge", "timeout": 20.0, "attempts": 3}
        return Judge(JudgeEndpoint(**(values | changes)), tmp_path / cache, ledger)

    return make


def asked(request: dict) -> str:
    return request["messages"][-1]["content"]


def ask(judge: Judge, text: str = "Is it so?", image: Path | None = None, system: str = "") -> str:
    return judge.ask_all([Question(text, image, system)])[0]


# Requests


@pytest.mark.parametrize("ending", ["", "/v1/", "/v1/chat/completions"])
def test_request_has_model_messages_and_key_whatever_the_url_names(chat_server, make, ending):
    assert ask(make(url=chat_server.url.removesuffix("/v1") + ending), system="You are a judge.") == "yes"
    said = [{"role": "system", "content": "You are a judge."}, {"role": "user", "content": "Is it so?"}]
    wanted = {"model": "tiny-judge", "messages": said, "max_tokens": 1024, "temperature": 0.0}
    assert (chat_server.requests, chat_server.keys) == ([wanted], [f"Bearer {KEY}"])


def test_key_comes_from_the_named_variable_alone_and_no_proxy_is_asked_for_this_machine(chat_server, make, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("OTHER_KEY", "other")
    for number, variable in enumerate(("OTHER_KEY", "NOT_SET")):
        assert ask(make(key_variable=variable), f"{number}?") == "yes"
    assert chat_server.keys == ["Bearer other", None]


@pytest.mark.parametrize(("ending", "kind"), [("jpg", "jpeg"), ("bmp", "png")])
def test_jpeg_goes_as_it_is_and_other_formats_as_png(chat_server, make, tmp_path, ending, kind):
    file = tmp_path / f"red.{ending}"
    Image.new("RGB", (8, 6), "red").save(file)
    ask(make(), "What is it?", file)
    text, picture = chat_server.requests[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == f"data:image/{kind};base64"
    sent = base64.b64decode(data)
    assert (sent == file.read_bytes()) == (ending == "jpg")
    assert Image.open(io.BytesIO(sent)).getpixel((0, 0))[0] > 250


# Faults


@pytest.mark.parametrize("steps", [[429], [500, 503], ["half"], ["hang"], ["garbage"]], ids=str)
def test_fault_that_passes_is_asked_again(chat_server, make, steps):
    chat_server.steps, chat_server.headers = list(steps), SOON
    assert ask(make(timeout=0.5 if steps == ["hang"] else 20.0, attempts=9)) == "yes"
    assert len(chat_server.requests) > len(steps)


@pytest.mark.parametrize("error", [{"message": "unsupported", "param": "{}"}, {"message": "Unsupported: '{}'"}])
@pytest.mark.parametrize(("name", "left"), [("max_tokens", "max_completion_tokens"), ("temperature", "max_tokens")])
def test_models_that_take_other_options_are_understood(chat_server, make, name, left, error):
    chat_server.steps, chat_server.error = [400], {key: text.format(name) for key, text in error.items()}
    judge = make()
    assert [ask(judge, "One?"), ask(judge, "Two?")] == ["yes", "yes"]
    assert [name in request for request in chat_server.requests] == [True, False, False]
    assert left in chat_server.requests[-1]


NO_CONTENT = r"no choices\[0\].message.content in its answer"


@pytest.mark.parametrize(
    ("steps", "error", "changes", "words", "requests"),
    [
        ([500] * 3, None, {}, r"127\.0\.0\.1.*status 500 \(so it is\)", 3),
        (["hang"], None, {"timeout": 0.2, "attempts": 1}, "--judge-timeout", 1),
        ([], None, {"url": "http://127.0.0.1:9/v1", "attempts": 1}, "no connection.*--judge-url", 0),
        ([401], {"message": f"Incorrect key {KEY}"}, {}, "the key in OPENAI_API_KEY is not accepted", 1),
        ([429], {"message": "pay", "code": "insufficient_quota"}, {}, r"quota is used up \(pay\)", 1),
        ([400], {"message": "no images here"}, {}, r"\(no images here\); the model 'tiny-judge' refuses", 1),
        ([307], None, {}, "sends requests on to http://elsewhere", 1),  # it would carry the key
        ([404], None, {}, "status 404.*check --judge-url.*'tiny-judge'", 1),
        (["garbage"] * 2, None, {}, rf"{NO_CONTENT}.*asked twice; what was answered before is kept", 2),
        ([[1]] * 2, None, {}, rf"{NO_CONTENT} \[1\].*Check --judge-url", 2),
        ([{"choices": []}] * 2, None, {}, NO_CONTENT, 2),
        ([{"choices": [{"message": {"content": 3}}]}] * 2, None, {}, NO_CONTENT, 2),
    ],
    ids=str,
)
def test_fault_that_stays_is_an_error_with_the_way_out(chat_server, make, steps, error, changes, words, requests):
    chat_server.steps, chat_server.headers = steps, {"Location": "http://elsewhere"} if steps == [307] else SOON
    chat_server.error = error or chat_server.error
    with pytest.raises(RunError, match=words) as found:
        ask(make(**changes))
    assert KEY not in "".join(traceback.format_exception(found.value))
    assert len(chat_server.requests) == requests


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("url", url) for url in ("localhost:8000", "ftp://host/v1", "", "http://host:80x/v1", "http://h/v1?key=a")),
        ("url", "https://user:word@host/v1"),
        ("model", ""),
        ("timeout", 0.0),
        ("at_once", 0),
    ],
)
def test_what_cannot_be_is_refused_before_anything(key, value):
    with pytest.raises(ConfigError, match=f"--judge-{key.replace('_', '-')}"):
        JudgeEndpoint(**({"url": "http://localhost/v1", "model": "tiny-judge"} | {key: value}))


def test_missing_package_bad_key_and_bad_places_are_named(make, tmp_path, monkeypatch):
    (tmp_path / "torn.jpg").write_bytes(b"no image")
    (tmp_path / "file").touch()
    with pytest.raises(SampleError, match=r"torn\.jpg"):
        ask(make(), "What is it?", tmp_path / "torn.jpg")
    with pytest.raises(ConfigError, match="--judge-cache"):
        make("file/answers.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one\nsk-two")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: holds") as error:
        make()
    assert "sk-" not in str(error.value)
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[judge\]"'):
        make()


# Answers that are kept


def test_second_run_makes_no_request_unless_settings_or_pixels_are_others(chat_server, make, tmp_path):
    chat_server.answer = lambda request: "yes\u2028no\x85\nyes"
    assert ask(make()) == ask(make()) == "yes\u2028no\x85\nyes"
    assert len(chat_server.requests) == 1
    for change in ({"model": "other"}, {"temperature": 0.5}, {"max_tokens": 9}):
        ask(make(**change))
    assert len(chat_server.requests) == 4
    for colour in ("red", "blue", "red"):
        Image.new("RGB", (8, 6), colour).save(tmp_path / "image.png")
        ask(make(), "What is it?", tmp_path / "image.png")
    assert len(chat_server.requests) == 6


def test_line_that_a_kill_cut_off_costs_only_itself_and_silence_is_not_kept(chat_server, make, tmp_path):
    cache = tmp_path / "answers.jsonl"
    for text in ("One?", "Two?"):
        ask(make(), text)
    cache.write_bytes(cache.read_bytes()[:-9])
    chat_server.requests.clear()
    again = make()
    assert [ask(again, "One?"), ask(again, "Two?"), ask(make(), "Two?")] == ["yes", "yes", "yes"]
    assert len(chat_server.requests) == 1
    chat_server.answer = lambda request: None
    assert ask(make(), "Three?") == ""
    chat_server.answer = lambda request: "yes"
    assert ask(make(), "Three?") == "yes"


def test_key_is_neither_written_nor_logged(chat_server, make, tmp_path, caplog):
    chat_server.steps, chat_server.headers = [500], SOON
    chat_server.error = {"message": f"failed for {KEY}"}
    with caplog.at_level(logging.DEBUG):
        ask(make())
    assert caplog.text
    assert KEY not in caplog.text
    assert KEY not in (tmp_path / "answers.jsonl").read_text()


def test_answers_come_in_the_order_of_the_questions_and_are_whole_lines(chat_server, make, tmp_path):
    chat_server.answer = lambda request: request["messages"][0]["content"].upper()
    questions = [Question(f"question {number % 20}" * 500) for number in range(30)]
    assert make().ask_all(questions) == [f"QUESTION {number % 20}" * 500 for number in range(30)]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(chat_server.requests) == len(lines) == 20
    assert all(line.startswith('{"key"') and line.endswith("}") for line in lines)
    assert make().ask_all([]) == []


def test_error_in_one_of_many_ends_it_and_keeps_the_others(chat_server, make):
    questions = [Question(f"question {number}") for number in range(40)]
    judge = make(at_once=1)
    judge.ask_all(questions[:10])
    chat_server.requests.clear()
    chat_server.steps = [401] * 30
    with pytest.raises(RunError, match="OPENAI_API_KEY"):
        judge.ask_all(questions)
    assert len(chat_server.requests) < 15
    chat_server.steps = []
    chat_server.requests.clear()
    assert judge.ask_all(questions) == ["yes"] * 40
    assert len(chat_server.requests) == 30
    chat_server.steps = ["hang", 401]
    with pytest.raises(RunError, match="OPENAI_API_KEY"):
        make(at_once=2).ask_all([Question("One?"), Question("Two?")])
    assert len(chat_server.requests) == 32  # the one that hangs has not come to its next attempt


# Questions that may fail alone


def test_failed_question_does_not_end_the_run_and_each_fault_has_its_name(chat_server, make, tmp_path):
    faults = {"429": 429, "500": 500, "hang": "hang", "half": "half", "json": "garbage", "length": "length"}
    chat_server.answer = lambda request: None if asked(request) == "empty" else asked(request).upper()
    chat_server.rule, chat_server.headers = lambda request: faults.get(asked(request), "answer"), SOON
    chat_server.usage = {"prompt_tokens": 10, "completion_tokens": 2}
    names = [*faults, "empty", "refused", "well"]
    judge = make(timeout=1.5, attempts=2)
    refuses = lambda question, text: "refused by us" if text == "REFUSED" else ""  # noqa: E731
    replies = {question.text: reply for question, reply in judge.try_each([Question(n) for n in names], refuses)}
    named = {name: reply.fault for name, reply in replies.items()}
    assert named == {
        **{"429": "status 429", "500": "status 500", "hang": TIME_OUT, "half": BROKEN_CONNECTION},
        **{"json": BROKEN_JSON, "length": CUT, "empty": EMPTY, "refused": "refused by us", "well": ""},
    }
    assert replies["well"][:1] + replies["well"][3:5] == ("WELL", 10, 2)
    counted = judge.account.totals()
    twice = ("status 429", "status 500", TIME_OUT, BROKEN_CONNECTION, BROKEN_JSON, EMPTY)
    assert counted["faults"] == dict.fromkeys(twice, 2) | {CUT: 1, "refused by us": 1}
    assert (counted["requests"], counted["retries"]) == (len(chat_server.requests), 4)
    assert (counted["tokens_in"], counted["tokens_out"]) == (50, 10)
    assert [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == ["WELL"]


def test_ledger_keeps_counts_and_price_over_runs_and_answers_cost_once(chat_server, make, tmp_path):
    chat_server.usage = {"prompt_tokens": 1000, "completion_tokens": 500}
    prices = {"price_in": 2.0, "price_out": 4.0, "ledger": tmp_path / "requests.jsonl"}
    for _ in range(2):
        judge = make(**prices)
        assert judge.plan([Question("One?")])["cached"] == (1 if len(chat_server.requests) else 0)
        list(judge.try_each([Question("One?")]))
    assert judge.account.totals()["price"] == pytest.approx(0.004)
    assert len(chat_server.requests) == judge.account.totals()["requests"] == 1


def test_cost_limit_stops_before_the_request_that_could_exceed_it(chat_server, make, tmp_path):
    chat_server.usage = {"prompt_tokens": 250, "completion_tokens": 100}
    limits = {"price_in": 1.0, "price_out": 10.0, "cost_limit": 0.01, "max_tokens": 100, "at_once": 4}
    judge = make(**limits, ledger=tmp_path / "requests.jsonl")
    with pytest.raises(RunError, match="cost_limit: 0.01 would be exceeded"):
        list(judge.try_each([Question(f"question {number} {'x' * 900}") for number in range(40)]))
    assert 5 <= len(chat_server.requests) <= 8
    assert judge.account.price() <= 0.01
    with pytest.raises(RunError, match="cost_limit"):  # what was spent before counts
        list(make(**limits, ledger=tmp_path / "requests.jsonl").try_each([Question("x" * 40_000)]))
    with pytest.raises(ConfigError, match="cost_limit: needs price_in and price_out"):
        make(cost_limit=1.0)


class Time:
    """Milliseconds that pass where every question that is being asked waits for a limit, and nowhere else."""

    def __init__(self) -> None:
        self.now, self._asking, self._wakes, self._change = 0, 0, [], threading.Condition()

    @contextmanager
    def asking(self):
        with self._change:
            self._asking += 1
        yield
        with self._change:
            self._asking -= 1
            self._go_on()

    def sleep(self, seconds: float) -> None:
        with self._change:
            self._wakes.append(wake := self.now + round(seconds * 1000))
            self._go_on()
            self._change.wait_for(lambda: self.now >= wake)
            self._wakes.remove(wake)

    def _go_on(self) -> None:
        if self._wakes and len(self._wakes) == self._asking:
            self.now = max(self.now, min(self._wakes))
            self._change.notify_all()


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute"])
def test_rates_hold_at_the_server_with_retries(chat_server, make, limit, monkeypatch):
    clock, asking = Time(), limits.Account.asking

    @contextmanager
    def timed(*args):
        with clock.asking(), asking(*args):
            yield

    monkeypatch.setattr(limits.Account, "asking", timed)
    monkeypatch.setattr("pyrate_limiter.limiter.sleep", clock.sleep)
    monkeypatch.setattr("pyrate_limiter.abstracts.bucket.AbstractBucket._clock", SimpleNamespace(now=lambda: clock.now))
    chat_server.steps, chat_server.headers, chat_server.clock = [429, 500], SOON, lambda: clock.now
    rate = {"requests_per_minute": 20} if limit == "requests_per_minute" else {"tokens_per_minute": 20 * 110}
    questions = [Question(f"{number:2d}" + "x" * 38, max_tokens=100) for number in range(45)]
    assert all(not reply.fault for _, reply in make(at_once=4, **rate).try_each(questions))
    times = sorted(chat_server.times)
    assert len(times) == 47
    assert max(sum(start <= time < start + limits.MINUTE for time in times) for start in times) == 20
    assert times[-1] < 2.5 * limits.MINUTE  # and no slower than they must be


def test_plan_counts_and_sends_nothing(chat_server, make):
    judge = make(price_in=1.0, price_out=2.0)
    list(judge.try_each([Question("One?", max_tokens=7)]))
    questions = [Question(f"{name}?", system="Be brief.", max_tokens=50) for name in ("Two", "Three", "Four")]
    plan = judge.plan([Question("One?", max_tokens=7), *questions, questions[0]], count=len)
    counts = {name: plan[name] for name in ("requests", "cached", "tokens_in", "tokens_out")}
    assert counts == {"requests": 3, "cached": 1, "tokens_in": 3 * 9 + 4 + 6 + 5, "tokens_out": 150}
    assert plan["price"] == pytest.approx((42 + 300) / 1e6)
    system = {"role": "system", "content": "Be brief."}
    assert plan["examples"] == [[system, {"role": "user", "content": text}] for text in ("Two?", "Three?")]
    assert len(chat_server.requests) == 1


def test_run_ends_where_no_question_can_be_answered(chat_server, make, monkeypatch):
    chat_server.steps = [401] * 9
    with pytest.raises(RunError, match="OPENAI_API_KEY"):
        list(make(at_once=1).try_each([Question("One?")]))
    with pytest.raises(RunError, match="no connection"):
        list(make(url="http://127.0.0.1:9/v1", attempts=1).try_each([Question("One?")]))
    monkeypatch.setattr("minigpt4.evaluation.judge.MOST_FAULTS", 3)
    chat_server.steps = [500] * 9
    with pytest.raises(RunError, match="3 questions in a row without answer, the last: .*status 500"):
        list(make(at_once=1, attempts=1).try_each([Question(f"{number}?") for number in range(9)]))
    chat_server.steps = []
    asking = make().try_each([Question("One?"), Question("Two?")])
    next(asking)
    with pytest.raises(RunError, match="in use by another process"):
        list(make().try_each([Question("Three?")]))


# Yes and no in what people and models write

SAYS = {
    True: [
        *("yes", "**Yes**", "Yes, there is a dog in the image.", "Answer: yes", "There is a dog on the couch."),
        *("I can see a dog.", "<think>No dog? Yes, one.</think>\nYes", "No dog? One.</think>\n\nYes", "yes and no"),
    ],
    False: [
        *("No.", "no, but there is a cat", "Nope", "The answer is no.", "There is no dog in the image."),
        *("There isn\u2019t any dog.", "I don't see a dog.", "The image shows no dog."),
        "The picture does not contain a dog.",
    ],
    None: [
        *("<think>Let me look, no", "There is a dog, but no cat.", "I am not sure, maybe yes.", "I cannot tell."),
        *("It is either yes or no.", "A dog.", "The snow is nowhere to be noticed.", ""),
    ],
}


@pytest.mark.parametrize("says", SAYS)
def test_one_answer(says):
    assert {text: yes_no(text) for text in SAYS[says]} == dict.fromkeys(SAYS[says], says)


THREE_LINES = {
    (True, False, True): [
        *("1. yes\n2. no\n3. yes", "1: Yes\n2: No\n3: Yes", "Caption 1: yes\n\nCaption 2: no\n\nCaption 3: yes"),
        *("- **1.** Yes\n- **2.** No\n- **3.** Yes", "2. no\n1. yes\n3. yes", "yes\nno\nYES", "yes, no, yes"),
        "1. yes - the dog is there\n2. no - there is no cat\n3. yes - yes",
        "Here they are:\n1. yes\n2. no\n3. yes\nI hope that helps, no?",
        "<think>no no no no</think>yes\nno\nyes",
    ],
    None: [
        *("1. yes\n2. no", "1. yes\n2. no\n2. yes", "1. yes\n2. no\n4. yes", "1. yes\n2. no\n3. yes\n4. no"),
        *("1. yes\n2. perhaps\n3. yes", "yes\nno", "All of them are covered.", ""),
    ],
}


@pytest.mark.parametrize("says", THREE_LINES)
def test_three_lines(says):
    wanted = list(says) if says else None
    assert {text: yes_no_lines(text, 3) for text in THREE_LINES[says]} == dict.fromkeys(THREE_LINES[says], wanted)
    assert yes_no_lines("1. yes", 1) == yes_no_lines("Yes", 1) == [True]
