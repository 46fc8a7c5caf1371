"""Chat on the tiny model, answered by an engine."""

import pytest
from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.conversation.chat import Chat, Decoding
from minigpt4.conversation.templates import Conversation, TemplateConversation, conversation_for
from minigpt4.inference import Engine
from minigpt4.processors import Blip2ImageEvalProcessor

DECODING = Decoding(max_new_tokens=6)


@pytest.fixture
def chat(shared_model):
    model = shared_model(model_type="pretrain_vicuna0", end_sym="###")
    return Chat(Engine(model, Blip2ImageEvalProcessor(image_size=56)))


@pytest.fixture
def image(parity_dir):
    return Image.open(parity_dir / "images" / "img1_rgba.png")


def test_the_answer_is_that_of_generate_for_the_same_prompt(chat, image):
    chat.show(image)
    answer = chat.ask("What is this?", DECODING)
    pixels = Blip2ImageEvalProcessor(image_size=56)(image.convert("RGB"))[None]
    talk = conversation_for(chat.engine.model)
    talk.add_image()
    talk.ask("What is this?")
    talk.open_answer()
    assert [answer] == chat.engine.model.generate(pixels, [talk.get_prompt()], max_new_tokens=6, stop=["###"])


def test_a_second_question_is_asked_in_the_same_conversation(chat, image):
    chat.show(image)
    first = chat.ask("What is this?", DECODING)
    chat.ask(" And this? ", DECODING)
    texts = [text for _, text in chat.conversation.messages]
    assert texts[:3] == ["<Img><ImageHere></Img> What is this?", first, "And this?"]
    assert len(texts) == 4


def test_an_empty_question_is_refused_and_changes_nothing(chat, image):
    chat.show(image)
    with pytest.raises(SampleError, match="empty"):
        chat.ask("  ", DECODING)
    assert len(chat.conversation.messages) == 1


def test_published_types_have_the_published_conversation_and_others_that_of_training(shared_model):
    assert isinstance(conversation_for(shared_model(model_type="pretrain_vicuna0", end_sym="###")), Conversation)
    other = conversation_for(shared_model(prompt_template="USER: {} BOT: ", end_sym="</s>"))
    assert isinstance(other, TemplateConversation)
    assert (other.template, other.answer_end) == ("USER: {} BOT: ", "</s>")


# Streams


def test_streamed_and_whole_answers_are_the_same(chat, image):
    chat.show(image)
    pieces = list(chat.stream("What is this?", DECODING))
    assert len(pieces) > 1
    assert "".join(pieces) == "".join(chat.regenerate(DECODING)) == chat.conversation.messages[-1][1]


def test_a_reader_that_stops_ends_the_generation_and_keeps_what_was_said(chat):
    stream = chat.stream("What is this?", Decoding(max_new_tokens=1500))
    said = next(stream)
    stream.close()
    chat.engine.tick()
    assert chat.engine.num_running == 0
    assert chat.conversation.messages[-1] == ["Assistant: ", said]
    assert chat.reply.finish_reason == "cancelled"
    assert chat.ask("And now?", DECODING)
    assert len(chat.conversation.messages) == 4


def test_an_error_leaves_the_conversation_as_it_was(chat, image):
    chat.show(image)
    chat.ask("What is this?", DECODING)
    before = chat.conversation.get_prompt()
    for failing in (chat.stream, lambda question, decoding: chat.regenerate(decoding)):
        with pytest.raises(SampleError, match="this LLM reads"):
            list(failing("And this?", Decoding(max_new_tokens=5000)))
        assert chat.conversation.get_prompt() == before
    with pytest.raises(SampleError, match="<ImageHere>"):
        chat.ask("<ImageHere>", DECODING)
    assert chat.conversation.get_prompt() == before


def test_nothing_can_be_given_anew_before_a_question(chat, image):
    chat.show(image)
    with pytest.raises(SampleError, match="nothing was asked"):
        chat.regenerate(DECODING)


def test_sampling_repeats_with_its_seed(chat):
    hot = Decoding(max_new_tokens=12, do_sample=True, temperature=5.0, top_p=1.0)
    said = ["".join(chat.stream("Hello?", hot, seed)) for seed in (1,)]
    said += ["".join(chat.regenerate(hot, seed)) for seed in (1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_long_conversation_drops_its_oldest_turns_and_says_so(chat, image):
    chat.show(image)
    for _ in range(3):
        chat.ask("Tell me more about it. " * 60, DECODING)
    chat.ask("And now?", Decoding(max_new_tokens=400))
    assert 0 < chat.reply.dropped_turns < 3
    assert chat.reply.prompt_tokens + 400 <= chat.engine.model.context_length
    assert len(chat.conversation.messages) == 8


def test_after_a_restart_nothing_is_left(chat, image):
    chat.show(image)
    chat.ask("What is this?", DECODING)
    chat.restart()
    assert (chat.conversation.messages, chat.pictures) == ([], [])
    chat.ask("Hello?", DECODING)


def test_a_placeholder_that_the_model_says_is_not_taken_for_an_image(chat, monkeypatch):
    monkeypatch.setattr(type(chat.engine), "submit", lambda self, request: _Saying("An <ImageHere> indeed."))
    assert chat.ask("Hello?", DECODING) == "An <ImageHere> indeed."
    assert chat.conversation.messages[-1][1] == "An  indeed."


class _Saying:
    def __init__(self, text):
        self.text = text

    def __iter__(self):
        return iter([self.text])

    def close(self):
        pass
