"""Who is on the page."""

import threading

import pytest

from minigpt4.conversation.decoding import Decoding
from minigpt4.serving.page_session import NotNowError, PageSession, Visitors
from minigpt4.serving.uploads import Limits


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture
def make_visitors(engine, tmp_path):
    engine.release()
    return lambda **changes: Visitors(lambda: PageSession(engine, Limits(), tmp_path), **changes)


def answer(session, question):
    session.put(question)
    for _ in session.answer(Decoding(max_new_tokens=5)):
        pass


def test_each_visitor_has_a_conversation_that_nobody_else_sees(make_visitors):
    visitors = make_visitors()
    answer(visitors.session("a"), "Mine?")
    assert visitors.session("b").messages == []
    assert visitors.session("a").messages[0].content == "Mine?"


@pytest.mark.parametrize("name", [None, ""])
def test_callers_without_a_name_do_not_share_a_conversation(make_visitors, name):
    with pytest.raises(NotNowError, match="in a browser"):
        make_visitors().session(name)


def test_a_closed_tab_ends_its_answer_also_before_the_first_word(engine, make_visitors):
    visitors = make_visitors()
    session = visitors.session("a")
    engine.hold()
    session.put("Hello?")
    thread = threading.Thread(target=lambda: list(session.answer(Decoding(num_beams=2))))
    thread.start()
    engine.wait_for(running=1)
    visitors.leave("a")
    thread.join(10)
    assert not thread.is_alive()
    visitors.leave("never seen")


def test_who_comes_back_in_time_finds_the_conversation_and_later_it_is_forgotten(make_visitors):
    visitors = make_visitors()
    answer(visitors.session("a"), "Mine?")
    visitors.leave("a")
    assert visitors.session("a").messages
    visitors = make_visitors(keep=0.0)
    answer(visitors.session("a"), "Mine?")
    visitors.leave("a")
    visitors.session("b")
    assert len(visitors) == 1


def test_there_are_never_more_conversations_than_the_most(make_visitors):
    visitors = make_visitors(most=2)
    for name in "abcab":
        visitors.session(name)
        assert len(visitors) <= 2
    assert visitors.session("b") is visitors.session("b")
