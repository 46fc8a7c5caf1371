"""A visitor's conversation without a browser."""

import threading
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.conversation.chat import Chat, Decoding
from minigpt4.inference import BusyError
from minigpt4.serving.page_session import NotNowError, PageSession
from minigpt4.serving.uploads import Limits, TooLargeError

FEW = Decoding(max_new_tokens=5)
MANY = Decoding(max_new_tokens=60)
LONG = "Which colours?"
"""Of the second image the tiny model has much to say about it."""


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture
def images(parity_dir):
    return [parity_dir / "images" / name for name in ("img0_rgb_nonsquare.png", "img1_rgba.png")]


@pytest.fixture
def session(engine, tmp_path):
    engine.release()
    return PageSession(engine, Limits(), tmp_path / "shown")


def ask(session, question, upload=None, decoding=FEW, **options):
    session.put(question, upload)
    for _ in session.answer(decoding, **options):
        pass
    return session.turns[-1].answer


def begin(session, question, decoding=MANY):
    """Ask in a thread of its own, as a page does; returns it, once it reads."""
    session.put(question)
    thread = threading.Thread(target=lambda: list(session.answer(decoding)))
    thread.start()
    return thread


def texts(session):
    return [message.content for message in session.messages if not isinstance(message.content, Path)]


def test_a_conversation_over_several_images_is_that_of_a_chat(engine, session, images):
    chat = Chat(engine)
    for image, question in zip(images, ("What is this?", "And this?"), strict=True):
        chat.show(Image.open(image))
        assert ask(session, question, image) == chat.ask(question, FEW)
    assert ask(session, "Which is larger?") == chat.ask("Which is larger?", FEW)
    assert [message.is_user for message in session.messages] == [True, True, False] * 2 + [True, False]


def test_a_question_is_shown_before_it_is_answered_and_the_answer_grows(engine, session, images):
    engine.hold()
    session.put(LONG, images[1])
    assert texts(session) == [LONG]
    assert session.is_busy
    answer = session.answer(MANY)
    seen = []
    for _ in range(3):
        engine.let(4)
        next(answer)
        seen.append(session.turns[-1].answer)
    assert 0 < len(seen[0]) < len(seen[1]) < len(seen[2])
    answer.close()
    assert session.turns[-1].answer == seen[-1]
    assert session.note.endswith("stopped")
    assert not session.is_busy


def test_images_are_shown_small_and_without_what_the_file_told(session, tmp_path):
    image = Image.new("RGB", (3000, 1500), "red")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    image.save(tmp_path / "holiday.jpg", exif=exif)
    session.put("What is this?", tmp_path / "holiday.jpg")
    shown = session.messages[0].content
    with Image.open(shown) as small:
        assert max(small.size) == 768
        assert not small.getexif()
    assert "holiday" not in shown.name


def test_stop_keeps_what_was_said_and_frees_the_place(engine, session, images):
    ask(session, "What is this?", images[1])
    engine.hold()
    thread = begin(session, LONG)
    engine.wait_for(running=1)
    engine.let(8)
    while not session.turns[-1].answer:
        assert thread.is_alive()
    session.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert session.take_draft() is None
    assert "stopped" in session.note
    engine.release()
    assert ask(session, "And now?")
    assert engine.num_running == engine.num_waiting == 0


def test_stop_before_the_first_word_gives_the_question_back(engine, session, images):
    engine.hold()
    session.put(LONG, images[1])
    session.stop()
    draft = session.take_draft()
    assert (draft.question, draft.upload) == (LONG, images[1])
    assert session.take_draft() is None
    assert session.messages == []
    assert list(session.answer(FEW)) == []  # its turn in the queue comes, and there is nothing to answer
    thread = begin(session, LONG)
    session.stop()
    thread.join(10)
    assert session.take_draft().question == LONG
    assert session.messages == []


def test_while_an_answer_is_written_nothing_else_is_asked(engine, session):
    engine.hold()
    thread = begin(session, LONG)
    engine.wait_for(running=1)
    for act in (lambda: session.put("Another?"), session.put_again, session.take_back):
        with pytest.raises(NotNowError, match="stop it first"):
            act()
    session.restart()
    thread.join(10)
    assert session.messages == []


def test_another_answer_takes_the_place_of_the_last(session, images):
    first = ask(session, "What is this?", images[0])
    session.put_again()
    assert texts(session) == ["What is this?"]
    assert list(session.answer(FEW)) != []
    assert session.turns[0].answer == first
    assert len(session.turns) == 1


def test_an_edited_question_forgets_what_was_said_since_images_included(engine, session, images):
    ask(session, "What is this?", images[0])
    ask(session, "And this?", images[1])
    session.put_edited(0, "Who is this?")
    list(session.answer(FEW))
    chat = Chat(engine)
    chat.show(Image.open(images[0]))
    assert session.turns[0].answer == chat.ask("Who is this?", FEW)
    assert [message.content for message in session.messages][1:] == ["Who is this?", session.turns[0].answer]
    with pytest.raises(SampleError, match="not there any more"):
        session.put_edited(1, "And this?")


def test_an_edit_without_an_answer_brings_the_old_conversation_back(engine, session, images):
    said = [ask(session, "What is this?", images[0]), ask(session, "And this?", images[1])]
    session.put_edited(0, "Who is this?")
    with pytest.raises(SampleError, match="this LLM reads"):
        list(session.answer(Decoding(max_new_tokens=5000)))
    assert [turn.answer for turn in session.turns] == said
    assert session.take_draft().question == "Who is this?"
    assert ask(session, "Why?") == _third_answer(engine, images)


def _third_answer(engine, images):
    chat = Chat(engine)
    for image, question in zip(images, ("What is this?", "And this?"), strict=True):
        chat.show(Image.open(image))
        chat.ask(question, FEW)
    return chat.ask("Why?", FEW)


def test_the_last_question_can_be_taken_back(session, images):
    ask(session, "What is this?", images[0])
    ask(session, "And this?", images[1])
    session.take_back()
    draft = session.take_draft()
    assert (draft.question, draft.upload) == ("And this?", images[1])
    assert len(session.turns) == 1


def test_restart_forgets_everything(engine, session, images):
    ask(session, "What is this?", images[0])
    session.restart()
    assert session.messages == []
    assert ask(session, "And now?") == Chat(engine).ask("And now?", FEW)


@pytest.mark.parametrize(
    ("question", "reason"), [(" ", "write a question"), ("x" * 41, "41 characters"), ("<ImageHere>?", "stands for")]
)
def test_what_cannot_be_asked_changes_nothing(engine, tmp_path, images, question, reason):
    session = PageSession(engine, Limits(question_chars=40), tmp_path)
    with pytest.raises(SampleError, match=reason):
        session.put(question, images[0])
    assert session.messages == []
    assert not session.is_busy


def test_limits_of_a_conversation(engine, tmp_path, images):
    session = PageSession(engine, Limits(images=1, turns=4, image_pixels=100), tmp_path)
    with pytest.raises(TooLargeError, match="pixels"):
        session.put("What is this?", images[0])
    session.limits = Limits(images=1, turns=4)
    ask(session, "What is this?", images[0])
    with pytest.raises(SampleError, match="1 images are the most"):
        session.put("And this?", images[1])
    ask(session, "And now?")
    with pytest.raises(SampleError, match="as long as it may be"):
        session.put("And then?")


def test_turns_that_do_not_fit_are_left_out_and_the_note_says_so(engine, session, images):
    ask(session, "What is this?", images[0])
    ask(session, "word " * 300)
    tokens = 1850
    ask(session, "And now?", decoding=Decoding(max_new_tokens=tokens, min_length=1))
    assert "left out: this LLM reads 2,048 positions" in session.note


def test_the_note_counts_tokens_and_names_the_limit(session, images):
    ask(session, LONG, images[1])
    assert session.note.endswith("tokens read, 5 written · ended at the limit of tokens")


def test_a_busy_engine_is_an_error_and_the_question_is_kept(engine, tmp_path):
    engine.hold()
    full, other = (PageSession(engine, Limits(), tmp_path) for _ in range(2))
    engine.max_waiting, before = 0, engine.max_waiting
    try:
        full.put("Hello?")
        with pytest.raises(BusyError):
            list(full.answer(FEW))
    finally:
        engine.max_waiting = before
    assert full.take_draft().question == "Hello?"
    engine.release()
    assert ask(other, "Hello?")


def test_an_answer_that_takes_too_long_ends(engine, tmp_path):
    engine.hold()
    session = PageSession(engine, Limits(seconds=0.05), tmp_path)
    session.put("Hello?")
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        list(session.answer(FEW))
    assert session.take_draft().question == "Hello?"
    assert not session.is_busy


def test_a_lost_place_in_the_queue_does_not_block_the_visitor(session):
    session.put("Lost?")
    session.put("Found?")
    assert texts(session) == ["Found?"]
    list(session.answer(FEW))
    assert len(session.turns) == 1
