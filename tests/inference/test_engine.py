"""The engine on the tiny model: inline, and in a thread of its own."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, SampleError, WeightsError
from minigpt4.conversation.chat import Chat, Decoding, Request
from minigpt4.inference.attribution import Trace
from minigpt4.inference.engine import Engine
from minigpt4.processors import Blip2ImageEvalProcessor

SHORT = Decoding(max_new_tokens=6)
ENDLESS = Decoding(max_new_tokens=1500)
QUESTIONS = ["What is this?", "Tell me all about the people and the boats in it.", "Why?", "Describe it."]


@pytest.fixture
def model(shared_model):
    return shared_model(model_type="pretrain_vicuna0", end_sym="###")


@pytest.fixture
def make(model):
    """An engine that works while its replies are read."""
    return lambda **keys: Engine(model, Blip2ImageEvalProcessor(image_size=56), **keys)


@pytest.fixture
def images(parity_dir):
    return [Image.open(parity_dir / "images" / name) for name in ("img1_rgba.png", "img3_rgb.png")]


@pytest.fixture
def encoded(model):
    """How many images each call of the vision encoder got."""
    counts = []
    hook = model.visual_encoder.register_forward_hook(lambda part, args, out: counts.append(len(args[0])))
    yield counts
    hook.remove()


def request(engine, question="What is this?", decoding=SHORT, images=(), **more):
    talk, pictures = engine.new_conversation(), [engine.preprocess(image) for image in images]
    for _ in pictures:
        talk.add_image()
    talk.ask(question)
    talk.open_answer()
    return Request(talk, pictures, decoding, **more)


def generated(engine, asked):
    """What the model's own `generate` says to a request."""
    pixels = torch.stack([picture.pixels_3SS for picture in asked.pictures])[None] if asked.pictures else None
    decoding = {"max_new_tokens": asked.decoding.max_new_tokens, "num_beams": asked.decoding.num_beams}
    return engine.model.generate(pixels, [asked.conversation.get_prompt()], stop=["###", *asked.stop], **decoding)[0]


def test_requests_that_are_answered_together_get_the_answers_they_get_alone(make, images):
    engine = make()
    asked = [request(engine, question, images=images[:1]) for question in QUESTIONS]
    asked.append(request(engine, "With beams?", Decoding(3, max_new_tokens=6), images))
    replies = [engine.submit(each) for each in asked]
    engine.tick()
    assert engine.num_running == 5
    assert ["".join(reply) for reply in replies] == [generated(engine, each) for each in asked]
    assert engine.num_running == 0
    embeds = engine._image_embeds(asked[-1].pictures, "minigpt4")
    read = engine.model.get_context_emb(asked[-1].conversation.get_prompt(), embeds).shape[1]
    assert (replies[-1].prompt_tokens, replies[-1].completion_tokens) == (read, 6)


def test_no_more_answers_than_allowed_are_in_the_making_and_a_wider_search_runs_by_itself(make):
    engine = make(max_rows=4)
    replies = [engine.submit(request(engine)) for _ in range(5)]
    wide = [engine.submit(request(engine, decoding=Decoding(beams, max_new_tokens=3))) for beams in (4, 6)]
    engine.tick()
    assert (engine.num_running, engine.num_waiting) == (4, 3)
    assert len({"".join(reply) for reply in replies}) == 1
    assert ["".join(reply) for reply in wide] == [generated(engine, reply.request) for reply in wide]


# Ending before the end


@pytest.mark.parametrize("decoding", [ENDLESS, Decoding(2, max_new_tokens=1500)])
def test_closing_a_reply_frees_its_place_at_once(make, decoding):
    engine = make()
    reply, other = engine.submit(request(engine, decoding=decoding)), engine.submit(request(engine))
    engine.tick()
    reply.close()
    engine.tick()
    assert engine.num_running == 1
    assert (reply.finish_reason, reply.completion_tokens < 3) == ("cancelled", True)
    assert "".join(other) == generated(engine, other.request)


def test_a_reply_that_is_closed_while_it_waits_is_never_begun_and_gives_its_place_away(make, encoded, images):
    engine = make(max_rows=1, max_waiting=1)
    running = engine.submit(request(engine, decoding=Decoding(max_new_tokens=12)))
    engine.tick()
    closed = engine.submit(request(engine, images=images))
    closed.close()
    assert list(closed) == []
    engine.tick()
    other = engine.submit(request(engine))
    assert "".join(running)
    assert "".join(other) == generated(engine, other.request)
    assert encoded == []


# Faults


def test_a_request_that_cannot_be_read_fails_alone(make, images):
    engine = make()
    good, asked = engine.submit(request(engine)), request(engine, images=images)
    for change, complaint in (({"checkpoint": "last"}, "no checkpoint 'last'.*minigpt4"), ({"stop": [""]}, "empty")):
        with pytest.raises(ConfigError, match=complaint):  # at once
            engine.submit(replace(asked, **change))
    for bad, complaint in (
        (request(engine, decoding=Decoding(max_new_tokens=1 << 20)), "lower the maximum of new tokens"),
        (replace(asked, pictures=asked.pictures[:1]), "room for 2 images, not 1"),
    ):
        with pytest.raises(SampleError, match=complaint):
            list(engine.submit(bad))
    assert "".join(good) == generated(engine, good.request)


def test_an_error_in_the_model_reaches_all_readers_and_the_next_request_is_answered(make, model):
    engine = make()
    replies = [engine.submit(request(engine)) for _ in range(2)]

    def break_logits(part, args, out):
        out.logits.fill_(float("nan"))

    hook = model.llama_model.register_forward_hook(break_logits)
    for reply in replies:
        with pytest.raises(MiniGPT4Error, match="not finite"):
            list(reply)
    hook.remove()
    assert "".join(engine.submit(request(engine)))


# Images and checkpoints


def test_images_are_encoded_once_all_of_a_request_together_and_forgotten_ones_again(make, encoded, images):
    chat = Chat(make())
    assert chat.show(images[0]) == chat.show(images[0].copy()) != chat.show(images[1])
    first = chat.ask("What is this?", SHORT)
    assert "".join(chat.regenerate(SHORT)) == first
    chat.ask("And this?", SHORT)
    assert encoded == [2]
    engine = make(keep_images=1)
    for _ in range(2):
        "".join(engine.submit(request(engine, images=images)))
    assert encoded == [2, 2, 1]


def test_checkpoints_share_the_frozen_parts_and_may_be_asked_at_the_same_time(build_model, images, other_checkpoint):
    model, encoded = build_model(model_type="pretrain_vicuna0", end_sym="###").eval(), []
    engine = Engine(model, Blip2ImageEvalProcessor(image_size=56), {"other": other_checkpoint}, name="first")
    assert engine.checkpoints == ["first", "other"]
    model.visual_encoder.register_forward_hook(lambda part, args, out: encoded.append(len(args[0])))
    asked = [request(engine, images=images[:1], checkpoint=name) for name in ("other", None, "other")]
    said = ["".join(reply) for reply in [engine.submit(each) for each in asked]]
    assert sum(encoded) == 1
    alone = []
    for name in ("other", "first"):
        engine.switch.use(name)
        alone.append(generated(engine, asked[0]))
    assert said == [alone[0], alone[1], alone[0]]
    assert alone[0] != alone[1]


def test_a_checkpoint_that_does_not_fit_is_found_at_the_start(make, tmp_path):
    torch.save({"model": {"llama_proj.weight": torch.zeros(3, 3)}}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match="bad.pth"):
        make(checkpoints={"bad": tmp_path / "bad.pth"})


# Where it looked


def test_maps_are_made_between_the_tokens_of_answers_that_stay_as_they_are(make, model, images, parity_dir):
    engine = make(checkpoints={"second": parity_dir / "train_main_checkpoint_0.pth"})
    asked = request(engine, images=images)
    answer, found = "a red bus", {}
    reply = engine.submit(replace(asked, decoding=Decoding(max_new_tokens=9)))
    engine.tick()
    for name in engine.checkpoints:
        found[name] = engine.maps(replace(asked, checkpoint=name), answer, 2).result(0)
    engine.switch.use(engine.checkpoints[0])
    assert "".join(reply) == generated(engine, reply.request)
    pixels = torch.stack([picture.pixels_3SS for picture in asked.pictures])
    expected = Trace(model, pixels, asked.conversation.get_prompt(), answer).maps([2])
    for method, maps_nhw in expected.items():
        assert maps_nhw.shape == (2, 4, 4)
        torch.testing.assert_close(*map(torch.from_numpy, (found["minigpt4"][method], maps_nhw)), rtol=1e-4, atol=1e-6)
        assert not (found["second"][method] == maps_nhw).all()
    with pytest.raises(ConfigError):
        engine.maps(replace(asked, checkpoint="none"), answer, 2)
    engine.stop()
    with pytest.raises(RunError):
        engine.maps(asked, answer, 2)
