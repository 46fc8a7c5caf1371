"""Chat on the tiny model, answered by an engine."""

import pytest
from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.conversation.chat import Chat, Decoding
from minigpt4.conversation.templates import conversation_for
from minigpt4.inference.engine import Engine
from minigpt4.processors import Blip2ImageEvalProcessor

DECODING = Decoding(max_new_tokens=6)


@pytest.fixture
def chat(shared_model, parity_dir):
    """A conversation in which an image was shown."""
    chat = Chat(Engine(shared_model(model_type="pretrain_vicuna0", end_sym="###"), Blip2ImageEvalProcessor(56)))
    chat.show(Image.open(parity_dir / "images" / "img1_rgba.png"))
    return chat


def texts(chat):
    return [text for _, text in chat.conversation.messages]


def test_streamed_and_whole_answers_are_those_of_generate_for_the_same_prompt(chat):
    asked = chat.conversation.copy()
    asked.ask("What is this?")
    asked.open_answer()
    wanted = chat.engine.model.generate(
        chat.pictures[0].pixels_3SS[None], [asked.get_prompt()], max_new_tokens=6, stop=["###"]
    )
    pieces = list(chat.stream("What is this?", DECODING))
    assert len(pieces) > 1
    assert ["".join(pieces)] == ["".join(chat.regenerate(DECODING))] == wanted
    chat.ask(" And this? ", DECODING)
    assert texts(chat)[:3] == ["<Img><ImageHere></Img> What is this?", wanted[0], "And this?"]
    assert len(texts(chat)) == 4
    chat.restart()
    assert (texts(chat), chat.pictures) == ([], [])
    chat.ask("Hello?", DECODING)


@pytest.mark.parametrize("image", ["<ImageHere>", "<Img><ImageHere></Img>"])
def test_other_types_than_the_published_talk_in_the_template_and_tags_of_training(shared_model, tmp_path, image):
    (tmp_path / "prompts.txt").write_text(f"{image} Describe it.\n")
    section = {"prompt_path": str(tmp_path / "prompts.txt"), "prompt_template": "USER: {} BOT: ", "end_sym": "</s>"}
    conversation = conversation_for(shared_model(**section))
    conversation.add_image()
    conversation.ask("Describe it.")
    conversation.open_answer()
    assert conversation.get_prompt() == f"USER: {image} Describe it. BOT: "
    assert conversation.answer_end == "</s>"


def test_what_is_refused_leaves_the_conversation_as_it_was(chat):
    with pytest.raises(SampleError, match="nothing was asked"):
        chat.regenerate(DECODING)
    chat.ask("What is this?", DECODING)
    before, endless = texts(chat), Decoding(max_new_tokens=5000)
    for ask, complaint in (
        (lambda: chat.stream("And this?", endless), "this LLM reads"),
        (lambda: chat.regenerate(endless), "this LLM reads"),
        (lambda: chat.stream("<ImageHere>"), "<ImageHere>"),
        (lambda: chat.stream("  "), "empty"),
    ):
        with pytest.raises(SampleError, match=complaint):
            list(ask())
        assert texts(chat) == before


def test_a_placeholder_that_the_model_says_is_not_taken_for_an_image(chat, monkeypatch):
    class Saying(list):
        def close(self):
            pass

    monkeypatch.setattr(Engine, "submit", lambda self, request: Saying(["An <ImageHere> indeed."]))
    assert chat.ask("Hello?", DECODING) == "An <ImageHere> indeed."
    assert texts(chat)[-1] == "An  indeed."
