"""The judge's client against a real server: faults, the cache, images, and what is never shown."""

import base64
import io
import logging
import sys
import traceback
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError, RunError, SampleError
from minigpt4.evaluation.judge import Judge, JudgeEndpoint, Question

KEY = "sk-very-secret"
SOON = {"Retry-After": "0.01"}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def make(chat_server, tmp_path):
    """`make(**changes)`: a judge on this machine."""

    def make(cache: str = "answers.jsonl", **changes) -> Judge:
        values = {"url": chat_server.url, "model": "tiny-judge", "timeout": 20.0, "attempts": 3}
        return Judge(JudgeEndpoint(**(values | changes)), tmp_path / cache)

    return make


def ask(judge: Judge, text: str, image: Path | None = None, system: str = "") -> str:
    return judge.ask_all([Question(text, image, system)])[0]


# Requests


def test_request_has_model_messages_and_key(chat_server, make):
    assert ask(make(), "Is it so?", system="You are a judge.") == "yes"
    (request,) = chat_server.requests
    assert request == {
        "model": "tiny-judge",
        "messages": [{"role": "system", "content": "You are a judge."}, {"role": "user", "content": "Is it so?"}],
        "max_tokens": 1024,
        "temperature": 0.0,
    }
    assert chat_server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_url_may_be_server_api_or_path(chat_server, make, ending):
    assert ask(make(url=chat_server.url.removesuffix("/v1") + ending), "Is it so?") == "yes"


def test_key_comes_from_the_named_variable(chat_server, make, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "other")
    ask(make(key_variable="OTHER_KEY"), "Is it so?")
    assert chat_server.keys == ["Bearer other"]


def test_server_without_key_is_asked_without_one(chat_server, make, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ask(make(), "Is it so?") == "yes"
    assert chat_server.keys == [None]


def test_key_of_another_variable_is_not_sent_in_place_of_the_named_one(chat_server, make):
    ask(make(key_variable="NOT_SET"), "Is it so?")
    assert chat_server.keys == [None]


def test_proxy_is_not_asked_for_this_machine(make, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert ask(make(), "Is it so?") == "yes"


def test_missing_package_is_an_error_that_says_how_to_get_it(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r'a judge needs the package openai; pip install -e "\.\[judge\]"'):
        make()


def test_jpeg_goes_as_it_is(chat_server, make, tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.jpg")
    ask(make(), "What is it?", tmp_path / "red.jpg")
    text, picture = chat_server.requests[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(data) == (tmp_path / "red.jpg").read_bytes()


def test_other_formats_go_as_png(chat_server, make, tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.bmp")
    ask(make(), "What is it?", tmp_path / "red.bmp")
    head, _, data = chat_server.requests[0]["messages"][0]["content"][1]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (255, 0, 0)


def test_broken_image_is_named(make, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"no image")
    with pytest.raises(SampleError, match=r"torn\.jpg"):
        ask(make(), "What is it?", tmp_path / "torn.jpg")


# Faults that pass


@pytest.mark.parametrize("steps", [[429], [500, 503]], ids=str)
def test_busy_servers_are_asked_again_after_the_time_that_they_name(chat_server, make, steps):
    chat_server.steps, chat_server.headers = list(steps), SOON
    assert ask(make(), "Is it so?") == "yes"
    assert len(chat_server.requests) == len(steps) + 1


@pytest.mark.parametrize("step", ["half", "hang"])
def test_server_that_breaks_off_or_hangs_is_asked_again(chat_server, make, step):
    chat_server.steps = [step]
    assert ask(make(timeout=0.5 if step == "hang" else 20.0, attempts=9), "Is it so?") == "yes"
    assert len(chat_server.requests) >= 2


def test_server_that_always_fails_is_an_error_with_its_words(chat_server, make):
    chat_server.steps, chat_server.headers = [500] * 3, SOON
    with pytest.raises(RunError, match=r"127\.0\.0\.1.*status 500 \(so it is\); asked up to 3 times"):
        ask(make(), "Is it so?")


def test_server_that_always_hangs_names_the_option(chat_server, make):
    chat_server.steps = ["hang"]
    with pytest.raises(RunError, match=r"no answer within 0\.2 s \(--judge-timeout\)"):
        ask(make(timeout=0.2, attempts=1), "Is it so?")


def test_nobody_listens(make):
    with pytest.raises(RunError, match=r"no connection.*refused.*check --judge-url"):
        ask(make(url="http://127.0.0.1:9/v1", attempts=1), "Is it so?")


# Faults that stay


def test_wrong_key_is_an_error_at_once_that_names_the_variable(chat_server, make):
    chat_server.steps, chat_server.error = [401], {"message": f"Incorrect key {KEY}"}
    with pytest.raises(RunError, match="the key in OPENAI_API_KEY is not accepted") as error:
        ask(make(), "Is it so?")
    assert KEY not in "".join(traceback.format_exception(error.value))
    assert len(chat_server.requests) == 1


def test_wrong_path_is_an_error_at_once(chat_server, make):
    with pytest.raises(RunError, match="status 404.*check --judge-url.*'tiny-judge'"):
        ask(make(url=chat_server.url + "/more"), "Is it so?")
    assert len(chat_server.requests) == 1


def test_used_up_quota_is_not_waited_for(chat_server, make):
    chat_server.steps, chat_server.error = [429], {"message": "pay", "code": "insufficient_quota"}
    with pytest.raises(RunError, match=r"quota is used up \(pay\)"):
        ask(make(), "Is it so?")
    assert len(chat_server.requests) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("garbage", "no answer that can be read.*check --judge-url"),
        ([1], r"no choices\[0\].message.content in its answer \[1\]"),
        ({"choices": []}, r"no choices\[0\].message.content"),
        ({"choices": [{"message": {"content": 3}}]}, r"no choices\[0\].message.content"),
    ],
    ids=str,
)
def test_answer_that_is_none_is_an_error(chat_server, make, body, words):
    chat_server.steps = [body]
    with pytest.raises(RunError, match=words):
        ask(make(), "Is it so?")


def test_page_for_people_is_shown(chat_server, make):
    chat_server.steps, chat_server.content_type = ["garbage"], "text/html"
    with pytest.raises(RunError, match=r"in its answer '<html>Sign in</html>'.*Check --judge-url"):
        ask(make(), "Is it so?")


def test_redirect_is_not_followed_for_it_would_carry_the_key(chat_server, make):
    chat_server.steps, chat_server.headers = [307], {"Location": f"{chat_server.url}/chat/completions"}
    with pytest.raises(RunError, match="sends requests on to http://127"):
        ask(make(), "Is it so?")
    assert len(chat_server.requests) == 1


def test_models_with_another_name_for_the_length_are_understood(chat_server, make):
    chat_server.steps, chat_server.error = [400], {"message": "unsupported", "param": "max_tokens"}
    judge = make()
    assert [ask(judge, "One?"), ask(judge, "Two?")] == ["yes", "yes"]
    assert ["max_completion_tokens" in request for request in chat_server.requests] == [False, True, True]


def test_models_without_temperature_are_understood(chat_server, make):
    chat_server.steps, chat_server.error = [400], {"message": "unsupported", "param": "temperature"}
    assert ask(make(), "One?") == "yes"
    assert ["temperature" in request for request in chat_server.requests] == [True, False]


def test_refused_request_has_the_servers_words(chat_server, make):
    chat_server.steps, chat_server.error = [400], {"message": "no images here"}
    with pytest.raises(RunError, match=r"\(no images here\); the model 'tiny-judge' refuses the request"):
        ask(make(), "Is it so?")


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host/v1", "", "http://host:80x/v1", "https://user:word@host/v1", "http://h/v1?key=a"],
)
def test_url_that_cannot_be_is_refused_before_anything(url):
    with pytest.raises(ConfigError, match="--judge-url"):
        JudgeEndpoint(url, "tiny-judge")


def test_time_limit_that_cannot_be_is_refused_before_anything():
    with pytest.raises(ConfigError, match=r"--judge-timeout: 0\.0"):
        JudgeEndpoint("http://localhost/v1", "tiny-judge", timeout=0.0)


def test_key_that_cannot_be_sent_is_not_shown(make, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one\nsk-two")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: holds") as error:
        make()
    assert "sk-" not in str(error.value)


# Answers that are there


def test_second_run_makes_no_request(chat_server, make):
    assert ask(make(), "Is it so?") == "yes"
    chat_server.answer = lambda request: "no"
    assert ask(make(), "Is it so?") == "yes"
    assert len(chat_server.requests) == 1


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 9}], ids=str)
def test_other_settings_are_asked_anew(chat_server, make, change):
    ask(make(), "Is it so?")
    ask(make(**change), "Is it so?")
    assert len(chat_server.requests) == 2


def test_other_pixels_under_the_same_name_are_asked_anew(chat_server, make, tmp_path):
    for colour in ("red", "blue", "red"):
        Image.new("RGB", (8, 6), colour).save(tmp_path / "image.png")
        ask(make(), "What is it?", tmp_path / "image.png")
    assert len(chat_server.requests) == 2


def test_line_that_a_kill_cut_off_costs_only_itself(chat_server, make, tmp_path):
    cache = tmp_path / "answers.jsonl"
    judge = make()
    ask(judge, "One?")
    ask(judge, "Two?")
    cache.write_bytes(cache.read_bytes()[:-9])
    chat_server.requests.clear()
    again = make()
    assert [ask(again, "One?"), ask(again, "Two?"), ask(make(), "Two?")] == ["yes", "yes", "yes"]
    assert len(chat_server.requests) == 1


def test_answers_with_every_kind_of_line_end_are_kept(chat_server, make):
    chat_server.answer = lambda request: "yes\u2028no\x85\nyes"
    assert ask(make(), "Is it so?") == ask(make(), "Is it so?") == "yes\u2028no\x85\nyes"
    assert len(chat_server.requests) == 1


def test_silence_is_asked_again_the_next_time(chat_server, make):
    chat_server.answer = lambda request: None
    assert ask(make(), "Is it so?") == ""
    chat_server.answer = lambda request: "yes"
    assert ask(make(), "Is it so?") == "yes"


def test_key_is_neither_written_nor_logged(chat_server, make, tmp_path, caplog):
    chat_server.steps, chat_server.headers = [500], SOON
    chat_server.error = {"message": f"failed for {KEY}"}
    with caplog.at_level(logging.DEBUG):
        ask(make(), "Is it so?")
    assert caplog.text
    assert KEY not in caplog.text
    assert KEY not in (tmp_path / "answers.jsonl").read_text()


def test_cache_that_cannot_be_written_is_an_error_before_the_first_question(chat_server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--judge-cache"):
        Judge(JudgeEndpoint(chat_server.url, "tiny-judge"), tmp_path / "file" / "answers.jsonl")


# Many questions


def test_answers_come_in_the_order_of_the_questions(chat_server, make):
    chat_server.answer = lambda request: request["messages"][0]["content"].upper()
    questions = [Question(f"question {number % 20}") for number in range(30)]
    assert make().ask_all(questions, at_once=4) == [f"QUESTION {number % 20}" for number in range(30)]
    assert len(chat_server.requests) == 20


def test_error_in_one_of_many_ends_it_and_keeps_the_others(chat_server, make):
    questions = [Question(f"question {number}") for number in range(40)]
    judge = make()
    judge.ask_all(questions[:10])
    chat_server.requests.clear()
    chat_server.steps = [401] * 30
    with pytest.raises(RunError, match="OPENAI_API_KEY"):
        judge.ask_all(questions, at_once=1)
    assert len(chat_server.requests) < 15
    chat_server.steps = []
    chat_server.requests.clear()
    assert judge.ask_all(questions) == ["yes"] * 40
    assert len(chat_server.requests) == 30


def test_error_in_one_of_many_does_not_wait_for_requests_under_way(chat_server, make):
    chat_server.steps = ["hang", 401]
    with pytest.raises(RunError, match="OPENAI_API_KEY"):
        make().ask_all([Question("One?"), Question("Two?")], at_once=2)
    assert len(chat_server.requests) == 2  # the one that hangs has not come to its next attempt


def test_no_questions_have_no_answers(chat_server, make):
    assert make().ask_all([]) == []


def test_cache_is_whole_lines_after_many_threads(chat_server, make, tmp_path):
    make().ask_all([Question(f"question {number}" * 500) for number in range(40)], at_once=8)
    lines = Path(tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 40
    assert all(line.startswith('{"key"') and line.endswith("}") for line in lines)
