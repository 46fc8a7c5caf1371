"""Answers of the server are those of the engine, whole and streamed, alone and together."""

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from minigpt4.conversation.chat import Chat, Decoding
from minigpt4.conversation.templates import get_template

PLAIN = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 8}
QUESTIONS = ["What is this?", "Who is it?", "Where are they?", "Why?", "How many boats are there?", "Is it a dog?"]


def opened(images):
    return [Image.open(io.BytesIO(image)) for image in images]


@pytest.fixture(scope="module")
def expected(engine):
    """What the model's own `generate` says to a prompt with these images."""

    def generate(prompt, images=(), **more):
        pixels = [engine.preprocess(image).pixels_3SS for image in opened(images)]
        stacked = torch.stack(pixels)[None] if pixels else None
        (answer,) = engine.model.generate(stacked, [prompt], stop=["###"], **{"max_new_tokens": 8} | more)
        return answer

    return generate


def vicuna(human):
    return f"{get_template('vicuna0').system}###Human: {human}###Assistant: "


def test_an_answer_is_that_of_the_chat(server, engine, tools, images):
    answer = server.chat([tools.picture(images[0]), tools.said("What is this?")], **PLAIN)
    chat = Chat(engine)
    chat.show(*opened(images[:1]))
    assert answer.status == 200
    assert answer.text == chat.ask("What is this?", Decoding(max_new_tokens=8))
    read = chat.reply.prompt_tokens
    assert answer.json["usage"] == {"prompt_tokens": read, "completion_tokens": 8, "total_tokens": read + 8}
    assert answer.json["choices"][0]["finish_reason"] == "length"
    assert answer.json["dropped_turns"] == 0


def test_images_stay_where_they_stand_in_the_text_and_in_their_order(server, expected, tools, images):
    first, second = (tools.picture(image) for image in images)
    answer = server.chat([tools.said("Compare"), first, tools.said("with"), second, tools.said("now.")], **PLAIN)
    image = "<Img><ImageHere></Img>"
    prompt = vicuna(f"Compare {image} with {image} now.")
    assert answer.text == expected(prompt, images)
    assert answer.text != expected(prompt, images[::-1])


def test_the_official_client_gets_the_same_text_streamed_and_whole(server, tools, images):
    client = server.client()
    messages = tools.asked([tools.picture(images[0]), tools.said("Tell me all.")])["messages"]
    asked = {"model": "first", "messages": messages, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *said, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in said)
    assert text == whole.choices[0].message.content
    assert len(said) > 5
    assert said[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in said[-2:]] == [None, whole.choices[0].finish_reason]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.id for chunk in chunks} == {last.id}


def test_a_stream_is_server_sent_events_that_are_sent_at_once_and_end_in_done(serve, nodelay):
    answer = serve().chat(stream=True)
    assert nodelay == [1]
    events = answer.content.decode().split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_eight_clients_at_once_get_the_answers_that_they_get_alone(server, engine, tools, images):
    contents = [[tools.picture(images[n % 2]), tools.said(QUESTIONS[n % len(QUESTIONS)])] for n in range(8)]

    def ask(content):
        answer = server.client().chat.completions.create(**tools.asked(content, max_tokens=12))
        return answer.choices[0].message.content

    alone = [ask(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        with engine.held():
            answers = [pool.submit(ask, content) for content in contents]
            engine.wait_for(running=8)
        assert [answer.result() for answer in answers] == alone


@pytest.mark.parametrize("is_stream", [False, True])
def test_several_answers_with_a_seed_differ_and_come_again(server, is_stream):
    asked = {"n": 3, "temperature": 1.5, "top_p": 1.0, "seed": 2**63 - 2, "max_tokens": 12, "stream": is_stream}
    first, second = (texts(server.chat(**asked)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


def texts(answer):
    """The text of every choice."""
    if "json" in answer.headers["content-type"]:
        return [choice["message"]["content"] for choice in answer.json["choices"]]
    chunks = [json.loads(line[6:]) for line in answer.content.decode().split("\n\n")[:-2]]
    found = ["", "", ""]
    for chunk in chunks:
        found[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    return found


def test_a_stop_string_ends_the_answer_before_it(server):
    whole = server.chat(max_tokens=30, repetition_penalty=1.0)
    stop = whole.text[4:7]
    answer = server.chat(max_tokens=30, repetition_penalty=1.0, stop=["never said", stop])
    assert answer.text == whole.text[: whole.text.index(stop)].rstrip()
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert answer.json["usage"]["completion_tokens"] < 30


def test_the_model_is_a_checkpoint_by_name(server, tools, images):
    content = [tools.picture(images[0]), tools.said("What is this?")]
    first, second = (server.chat(content, model=name, max_tokens=30) for name in ("first", "second"))
    assert (first.json["model"], second.json["model"]) == ("first", "second")
    assert first.text != second.text
    assert server.chat(content, max_tokens=30).text == first.text


def test_two_hundred_turns_are_answered_without_the_oldest(server):
    talk = [{"role": ("user", "assistant")[n % 2], "content": f"What do you see in picture {n}?"} for n in range(399)]
    answer = server.chat(messages=talk)
    assert answer.status == 200
    assert answer.json["dropped_turns"] > 50
    assert answer.json["usage"]["prompt_tokens"] + 6 <= 2048


def test_models_are_listed_and_described(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["first", "second"]
    assert client.models.retrieve("second").object == "model"
    for unknown in (server.get("/v1/models/gpt-4o"), server.chat(model="gpt-4o")):
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
        assert "there is no model 'gpt-4o'; there are: first, second" in unknown.error["message"]


def test_health_and_the_log_tell_what_goes_on(server, engine, caplog):
    with caplog.at_level("INFO"):
        answer = server.chat(max_tokens=5)
    prompt = answer.json["usage"]["prompt_tokens"]
    assert re.search(rf"127.0.0.1 model=first tokens={prompt}\+5 [\d.]+ s length", caplog.text)
    assert "Hello" not in caplog.text
    engine.wait_for(running=0)
    assert server.get("/healthz").json == {"status": "ok", "waiting": 0, "running": 0}


def test_health_says_when_the_engine_has_stopped(serve, make_engine):
    server = serve(engine=make_engine())
    assert server.get("/healthz").status == 200
    server.engine.stop()
    assert server.get("/healthz").status == 503
    assert server.chat().status == 503
