"""The chat page in a real browser: Debian's Chromium, driven by playwright, against a page on the tiny model."""

import re
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("gradio")

from minigpt4.conversation.chat import Chat, Decoding
from minigpt4.serving.uploads import Limits

LONG = "Which colours?"
"""Of the second image the tiny model has much to say about it."""
DECODING = Decoding(max_new_tokens=60, repetition_penalty=1.05)
ROWS = 2


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine(max_rows=ROWS)


@pytest.fixture(scope="module")
def address(engine, chromium, tmp_path_factory):
    """Of a page that is served in this process; without a browser nothing is started."""
    from minigpt4.serving.page import ChatPage
    from minigpt4.serving.page_gate import launch

    images = tmp_path_factory.mktemp("world") / "data/mini/flickr30k/flickr30k-images"
    images.mkdir(parents=True)
    Image.linear_gradient("L").save(images / "1.jpg")
    (images.parents[1] / "scenes_test.json").write_text('{"1": {"groups": [{}, {}]}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(images.parents[3])
        page = ChatPage(engine, Limits())
        yield launch(page, host="127.0.0.1", port=None, auth=None, share=False)
        page.blocks.close(verbose=False)


@pytest.fixture
def images(parity_dir):
    return [parity_dir / "images" / name for name in ("img0_rgb_nonsquare.png", "img1_rgba.png")]


class Visit:
    """A visitor's open tab; greedy answers of at most 60 tokens."""

    def __init__(self, browser, address):
        from playwright.sync_api import expect

        self.expect, self.host = expect, urlsplit(address).netloc
        self.context = browser.new_context(viewport={"width": 1280, "height": 1000})
        self.context.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        self.outside, self.errors = [], []
        self.page = self.context.new_page()
        self.page.on("request", self._note_request)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        chat = self.page.locator("#chat")
        self.answers = chat.get_by_test_id("bot")
        self.questions = chat.get_by_test_id("user").filter(has_not=self.page.locator("img"))
        self.pictures = chat.locator("img")
        self.question, self.note = self.page.locator("#question textarea"), self.page.locator("#note p")
        self.given, self.stop = self.page.locator("#question img"), self.page.locator("#question .stop-button")
        self.page.get_by_role("button", name="Settings").click()
        wanted = {"Temperature": "0", "Maximum of tokens": str(DECODING.max_new_tokens)}
        while any(self.value(slider) != value for slider, value in wanted.items()):
            for slider, value in wanted.items():  # one that just appeared may take its first value again
                self.set(slider, value)

    def _note_request(self, request):
        if urlsplit(request.url).netloc != self.host and not request.url.startswith(("data:", "blob:")):
            self.outside.append(request.url)

    def set(self, slider, value):
        number = self.page.get_by_label(f"number input for {slider}")
        number.fill(str(value))
        number.press("Enter")

    def value(self, slider):
        return self.page.get_by_label(f"range slider for {slider}").input_value()

    def give(self, *images):
        self.page.locator("#question input[type=file]").set_input_files(images)
        self.expect(self.given).to_have_count(len(images))

    def ask(self, question, *images):
        if images:
            self.give(*images)
        self.question.fill(question)
        self.question.press("Enter")

    def wait_for_answer(self, number):
        """Until the conversation has so many answers and the last is whole."""
        self.expect(self.answers).to_have_count(number)
        self.expect(self.stop).to_have_count(0)
        self.expect(self.question).to_be_editable()
        return self.answers.nth(number - 1).inner_text()

    def wait_for_more_than(self, text):
        self.page.wait_for_function(
            "n => [...document.querySelectorAll('#chat [data-testid=bot]')].at(-1)?.innerText.length > n", arg=len(text)
        )
        return self.answers.last.inner_text()


@pytest.fixture
def visit(browser, address, engine):
    """`visit()`: a visitor; when the test is over, nobody asked any other host for anything, and no script failed."""
    engine.release()
    visits = []

    def enter():
        visits.append(Visit(browser, address))
        return visits[-1]

    yield enter
    engine.release()
    for visit in visits:
        assert visit.outside == []
        assert visit.errors == []
        visit.context.close()


def letters(text):
    """What a browser does not change."""
    return re.sub(r"[^A-Za-z]", "", text)


def test_an_answer_grows_and_can_be_stopped_and_the_talk_goes_on(visit, engine, images):
    visitor, chat = visit(), Chat(engine)
    engine.hold()
    visitor.ask(LONG, images[1])
    visitor.expect(visitor.questions).to_have_count(1)  # at once: image and question
    visitor.expect(visitor.pictures).to_have_count(1)
    seen = [""]
    for _ in range(2):
        engine.let(6)
        seen.append(visitor.wait_for_more_than(seen[-1]))
    visitor.stop.click()
    engine.wait_for(running=0)  # before its next token
    engine.release()
    chat.show(Image.open(images[1]))
    whole = letters(chat.ask(LONG, DECODING))
    assert all(whole.startswith(letters(text)) for text in seen)
    assert len(letters(seen[-1])) < len(whole)
    visitor.ask("And now?")
    visitor.wait_for_answer(2)
    kept = letters(visitor.answers.first.inner_text())
    assert letters(seen[-1]) == kept[: len(letters(seen[-1]))]
    assert kept == whole[: len(kept)] != whole


def test_a_conversation_on_the_page_is_that_of_a_script(visit, engine, images):
    visitor, chat = visit(), Chat(engine)
    visitor.ask("What is this?", *images)
    for image in images:
        chat.show(Image.open(image))
    assert letters(visitor.wait_for_answer(1)) == letters(chat.ask("What is this?", DECODING))
    visitor.expect(visitor.pictures).to_have_count(2)
    visitor.ask("And this?", images[0])
    chat.show(Image.open(images[0]))
    again = letters(chat.ask("And this?", DECODING))
    assert letters(visitor.wait_for_answer(2)) == again
    visitor.expect(visitor.note).to_contain_text("tokens read")
    visitor.page.get_by_label("Retry").last.click()
    visitor.expect(visitor.answers).to_have_count(1)
    assert letters(visitor.wait_for_answer(2)) == again

    chat.take_back()
    visitor.page.get_by_label("Edit").last.click()
    visitor.page.locator("#chat textarea").fill("And <b>that</b>?")
    visitor.page.get_by_label("Submit").first.click()
    visitor.expect(visitor.questions.last).to_have_text("And <b>that</b>?")
    assert letters(visitor.wait_for_answer(2)) == letters(chat.ask("And <b>that</b>?", DECODING))

    visitor.page.get_by_label("Undo").last.click()
    visitor.expect(visitor.question).to_have_value("And <b>that</b>?")
    visitor.expect(visitor.given).to_have_count(1)
    visitor.expect(visitor.answers).to_have_count(1)
    visitor.page.get_by_label("Clear").first.click()
    visitor.expect(visitor.questions).to_have_count(0)


def test_visitors_at_once_see_their_own_words_and_others_wait_in_a_queue(visit, engine):
    visitors, chats = [visit() for _ in range(ROWS)], ["First question", "What is this?"]
    engine.hold()
    for visitor, question in zip(visitors, chats, strict=True):
        visitor.ask(question)
    engine.wait_for(running=ROWS)
    engine.let(10)
    for visitor in visitors:
        visitor.wait_for_more_than("")
    third = visit()
    third.ask("Who is there?")
    third.expect(third.page.locator("#chat")).to_contain_text("queue: 1/1")
    visitors[0].context.close()  # in mid-answer: its place is free, the other's answer is not touched
    engine.wait_for(running=1)
    engine.let(1)  # Gradio notices between two pieces
    engine.wait_for(running=ROWS)
    engine.release()
    for visitor, question in ((visitors[1], chats[1]), (third, "Who is there?")):
        assert letters(visitor.wait_for_answer(1)) == letters(Chat(engine).ask(question, DECODING))
        assert visitor.questions.all_inner_texts() == [question]
    visitors[1].page.reload()
    visitors[1].expect(visitors[1].question).to_be_editable()
    visitors[1].expect(visitors[1].questions).to_have_count(0)


def test_what_cannot_be_asked_is_told_and_stays_in_the_box(visit, engine, tmp_path, make_png, images):
    visitor = visit()
    (tmp_path / "page.png").write_text("<html></html>")
    (tmp_path / "wide.png").write_bytes(make_png(20_000, 20_000))
    for name, message in {"page.png": "not an image", "wide.png": "more pixels than 50,000,000"}.items():
        visitor.ask("What is this?", tmp_path / name)
        visitor.expect(visitor.page.get_by_text(message)).to_be_visible()
        visitor.expect(visitor.question).to_have_value("What is this?")
        visitor.page.get_by_label("Remove file").first.click()
    visitor.ask(" ")
    visitor.expect(visitor.page.get_by_text("write a question")).to_be_visible()
    engine.max_waiting, before = 0, engine.max_waiting
    visitor.ask("What is this?", images[0])
    visitor.expect(visitor.answers).to_contain_text("try again later")
    engine.max_waiting = before
    visitor.page.get_by_label("Retry").last.click()
    visitor.expect(visitor.answers).not_to_contain_text("try again later")
    assert visitor.wait_for_answer(1)


def test_an_example_is_asked_and_words_that_look_like_pages_stay_words(visit):
    visitor = visit()
    visitor.page.locator("#chat .example").first.click()
    visitor.expect(visitor.given).to_be_visible()
    visitor.expect(visitor.question).to_have_value("Describe this image in detail.")
    visitor.question.press("Enter")
    visitor.wait_for_answer(1)
    nasty = "<script>alert(1)</script> ![x](http://192.0.2.1/x.png) <img src=http://192.0.2.1/y.png> &lt; $$x$$ **b**"
    visitor.ask(nasty)
    visitor.expect(visitor.questions.last).to_have_text(nasty)
    assert visitor.questions.last.locator("img, script, strong").count() == 0


def test_a_click_on_a_word_of_the_answer_shows_where_it_looked(visit, images, monkeypatch):
    from minigpt4.serving import page as page_module

    visitor = visit()
    visitor.ask("What is this?", *images)
    answer = visitor.wait_for_answer(1)
    fold, words, maps = (visitor.page.locator(name) for name in ("#look", "#words .token", "#maps img"))
    visitor.expect(words).to_have_count(0)
    fold.get_by_role("button", name="Where did it look?").click()
    visitor.expect(words.first).to_be_visible()
    assert letters("".join(words.all_inner_texts())) == letters(answer)
    words.first.click()
    visitor.expect(maps).to_have_count(4)  # two methods on two images
    visitor.page.wait_for_function("() => [...document.querySelectorAll('#maps img')].every(i => i.naturalWidth > 0)")
    nasty = "<img src=http://192.0.2.1/y.png> <script>"
    last = page_module._last_answer
    monkeypatch.setattr(page_module, "_last_answer", lambda history: (last(history)[0], nasty))
    words.first.click()  # of another answer than the one there is now
    visitor.expect(visitor.page.locator("#maps")).to_contain_text("another answer")
    words.first.click()
    visitor.expect(visitor.page.locator("#maps h3")).to_have_text("<")
    visitor.expect(maps).to_have_count(4)
    shown = visitor.page.locator("#words .text").all_inner_texts()
    assert re.sub(r"\s", "", "".join(shown)) == nasty.replace(" ", "")
