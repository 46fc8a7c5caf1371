"""Chat on the tiny model, answered by an engine."""

import pytest
from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.conversation.chat import Chat
from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.model_template import conversation_for
from minigpt4.conversation.prompt_template import TemplateConversation
from minigpt4.conversation.templates import Conversation
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
    talk = conversation_for(chat.backend.model)
    talk.add_image()
    talk.ask("What is this?")
    talk.open_answer()
    assert [answer] == chat.backend.model.generate(pixels, [talk.get_prompt()], max_new_tokens=6, stop=["###"])


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
