"""The terminal, with an engine that can be held."""

import io
import os
import signal
import threading

import pytest

from minigpt4.conversation.chat import Chat, Decoding

FEW = Decoding(max_new_tokens=5)


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture(scope="module")
def demo(load_script):
    return load_script("demo.py")


@pytest.fixture
def terminal(demo, engine):
    return demo.Terminal(Chat(engine), FEW)


@pytest.fixture
def talk(terminal, monkeypatch, capsys):
    """`talk(*lines)`: exit status, what it printed, what it said to the person."""

    def talk(*lines, terminal=terminal):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = terminal.talk()
        return status, *capsys.readouterr()

    return talk


def test_answers_alone_are_printed_until_an_empty_line_and_a_cut_one_is_said_to_be_cut(talk, engine):
    status, out, err = talk("What is this?", "And now?", "", "Never asked")
    chat = Chat(engine)
    assert status == 0
    assert "cut at 5 tokens" in err
    assert out == f"{chat.ask('What is this?', FEW)}\n{chat.ask('And now?', FEW)}\n"


def test_commands_show_images_ask_again_and_restart(talk, terminal, engine, parity_dir):
    image = parity_dir / "images" / "img0_rgb_nonsquare.png"
    status, out, err = talk(f"/image {image}", "What is this?", "/again", "/restart", "/help", "What is this?")
    first, again, fresh = out.splitlines()
    assert (status, first) == (0, again)
    assert fresh == Chat(engine).ask("What is this?", FEW) != first
    assert "/image FILE" in err
    assert terminal.chat.pictures == []


@pytest.mark.parametrize(
    ("line", "reason"), [("/image nothing.png", "nothing.png"), ("/sing", "no command /sing"), ("/again", "nothing")]
)
def test_a_mistake_is_told_and_the_conversation_goes_on(talk, line, reason):
    status, out, err = talk(line, "What is this?")
    assert status == 2
    assert reason in err
    assert out.strip()


def test_words_are_printed_as_they_come_and_ctrl_c_ends_the_answer_alone(
    demo, terminal, engine, wait_until, monkeypatch
):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)

    def person():
        engine.wait_for(running=1)
        engine.let(4)
        wait_until(out.getvalue)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    thread = threading.Thread(target=person)
    with engine.held():
        thread.start()
        assert terminal.answer("Which colours?") == demo.INTERRUPTED
        engine.wait_for(running=0)
    thread.join()
    signal.signal(signal.SIGINT, before)
    said = out.getvalue()
    assert said.strip()
    assert terminal.chat.conversation.messages[-1][1] == said.strip("\n")
    assert terminal.answer("And now?") == 0


def test_each_answer_has_a_seed_of_its_own(demo, engine, talk):
    def said(seed):
        terminal = demo.Terminal(Chat(engine), Decoding(max_new_tokens=8, do_sample=True), seed)
        return talk("What is this?", "/again", terminal=terminal)[1].splitlines()

    first, second = said(1)
    assert first != second
    assert said(1) == [first, second]
    assert said(2)[0] == second
