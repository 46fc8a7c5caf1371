"""The pages in a real browser: Debian's Chromium, driven by playwright, over drawings of the mini world."""

import json
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("gradio")

from minigpt4.curation.records import FILES, CurationFolder
from minigpt4.curation.report import write_report
from minigpt4.curation.review import Review, VerdictFile
from minigpt4.mini.scenes import detailed_description, draw, sample_scene

COUNT = 12
RECORDS, REVIEWS = FILES["filter"], FILES["review"]
NASTY = (
    "![x](http://192.0.2.1/x.png) <img src=http://192.0.2.1/y.png>\n\n**b** `c` $$x$$ <script>alert(1)</script> &lt;"
)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """A folder with drawings and their records, as the filter leaves them."""
    folder = tmp_path_factory.mktemp("curation")
    with (folder / RECORDS).open("w") as file:
        for number in range(COUNT):
            scene = sample_scene("test", number, 0)
            draw(scene)[0].save(folder / f"{number} #1%.png")
            good = detailed_description(scene)
            spoilt = f"{good.replace(' on a ', ' on on a ')} It is a nice picture. It is a nice picture. ###"
            record = {"id": str(number), "image": f"{number} #1%.png", "text": spoilt, "refined": good}
            record |= {"refiner": "rules", "changed": True, "similarity": 0.5, "tokens_in": None, "tokens_out": None}
            file.write(json.dumps(record | {"failed_rules": [], "near_rules": ["repetition"], "kept": True}) + "\n")
    return folder


@pytest.fixture
def serve(drawings, chromium):
    """`serve(file, **settings)`: the address of a page over the drawings, served in this process."""
    from minigpt4.curation.review_page import ReviewPage
    from minigpt4.serving.page_gate import launch

    pages = []

    def serve(file, change=None, **settings):
        records = CurationFolder(drawings).read("filter")
        if change:
            change(records)
        pages.append(ReviewPage(Review(records, VerdictFile(file), **settings), drawings))
        return launch(pages[-1], host="127.0.0.1", port=None, auth=None, share=False)

    yield serve
    for page in pages:
        page.blocks.close(verbose=False)


class Visit:
    """A reviewer's open tab."""

    def __init__(self, browser, address, name, file):
        from playwright.sync_api import expect

        self.expect, self.host, self.file, self.name = expect, address, file, name
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.context.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        self.asked, self.errors = [], []
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.progress, self.changes = self.page.locator("#progress"), self.page.locator("#changes")
        self.image, self.text = self.page.locator("#picture img"), self.page.locator("#text textarea")
        self.page.wait_for_function("() => typeof keepName === 'function'")
        self.page.locator("#name").get_by_role("textbox").fill(name)
        self.page.keyboard.press("Enter")
        self.expect(self.progress).to_contain_text(f"{name} · 0 of ")

    def wait_for(self, done):
        """Until so many verdicts are given; the record that is shown then."""
        self.expect(self.progress).to_contain_text(f"{self.name} · {done} of ")
        return self.image.get_attribute("alt")

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def said(self):
        """The lines of this person so far, without what differs from run to run."""
        lines = [json.loads(line) for line in self.file.read_text().splitlines()]
        own = [line for line in lines if line["reviewer"] == self.name]
        return [{key: line[key] for key in line if key not in ("reviewer", "seconds", "time")} for line in own]


@pytest.fixture
def visit(browser, serve, tmp_path):
    """`visit(address, name)`: when the test is over, nobody asked any other host, and no script failed."""
    visits = []

    def enter(address, name="anna"):
        visits.append(Visit(browser, address, name, tmp_path / REVIEWS))
        return visits[-1]

    yield enter
    for visitor in visits:
        assert [url for url in visitor.asked if not url.startswith((visitor.host, "data:", "blob:"))] == []
        assert visitor.errors == []
        visitor.context.close()


def accepted(key):
    return {"id": key, "verdict": "accept", "reasons": []}


def test_keys_judge_and_the_next_record_comes_with_its_image_loaded(visit, serve, tmp_path, pytestconfig):
    visitor = visit(serve(tmp_path / REVIEWS))
    first = visitor.wait_for(0)
    visitor.expect(visitor.changes.locator("del").last).to_contain_text("It is a nice picture. ###")
    visitor.expect(visitor.changes).to_contain_text("repetition")
    widths = "[...document.querySelectorAll('#picture img, #ahead img')].map(image => image.naturalWidth)"
    visitor.page.wait_for_function(f"() => {widths}.join() === '224,224,224,224'")
    if folder := pytestconfig.getoption("--pictures"):
        visitor.page.screenshot(path=Path(folder) / "curation_review.png")
    visitor.press("a")
    second = visitor.wait_for(1)
    visitor.page.wait_for_function(f"() => {widths}.join() === '224,224,224,224'")
    before = len(visitor.asked)
    visitor.press("2", "5", "5", "1", "r")
    third = visitor.wait_for(2)
    assert not [url for url in visitor.asked[before:] if quote(f"/{third} #1%.png") in url]  # it was there
    visitor.expect(visitor.page.locator("#reasons input:checked")).to_have_count(0)
    visitor.press("s")
    visitor.expect(visitor.image).not_to_have_attribute("alt", third)
    visitor.press("Control+a", "Shift+Tab", "x", "7")  # mean nothing
    assert visitor.said() == [
        accepted(first),
        {"id": second, "verdict": "reject", "reasons": ["wrong about the image", "invented"]},
    ]


def test_keys_are_dead_while_typing_a_reload_keeps_the_text_and_control_enter_saves(visit, serve, tmp_path):
    visitor = visit(serve(tmp_path / REVIEWS))
    first, shown = visitor.wait_for(0), visitor.text.input_value()
    before = visitor.page.evaluate("localStorage.review")
    visitor.text.fill(f"{shown} Half a sen")
    visitor.press("Control+End", "t")
    visitor.page.wait_for_function("before => localStorage.review !== before", arg=before, polling=200)
    visitor.page.reload()
    assert visitor.wait_for(0) == first
    visitor.expect(visitor.text).to_have_value(f"{shown} Half a sent")
    visitor.text.fill(shown)
    visitor.press("Escape")
    visitor.press("e", "End", "Control+End")
    visitor.page.keyboard.type(" a r s z e 1")
    visitor.press("Enter", "Escape")
    visitor.press("e")
    visitor.press("Control+Enter")
    second = visitor.wait_for(1)
    edited = {"id": first, "verdict": "edit", "text": f"{shown} a r s z e 1", "reasons": []}
    assert visitor.said() == [edited]
    visitor.press("z")
    visitor.expect(visitor.progress).to_contain_text("your verdict was: edit")
    visitor.expect(visitor.text).to_have_value(f"{shown} a r s z e 1")
    visitor.press("r")
    visitor.expect(visitor.image).to_have_attribute("alt", second)
    visitor.expect(visitor.progress).not_to_contain_text("your verdict")
    visitor.press("e")
    visitor.text.fill(" ")
    visitor.press("Control+Enter")
    visitor.expect(visitor.page.get_by_text("the text is empty")).to_be_visible()
    assert visitor.said() == [edited, {"id": first, "verdict": "reject", "reasons": []}]


def test_two_at_once_a_reload_and_another_server_lose_and_double_nothing(visit, serve, tmp_path):
    file = tmp_path / REVIEWS
    address = serve(file)
    anna, ben = visit(address), visit(address, "ben")
    keys = [anna.wait_for(0), ben.wait_for(0)]
    assert len(set(keys)) == 2
    anna.press("a")
    keys.append(anna.wait_for(1))
    anna.page.reload()
    assert anna.wait_for(1) == keys[2]
    ben.press("a")
    keys.append(ben.wait_for(1))
    other = visit(serve(file), "carl")  # has no verdicts of its own, and reads theirs
    assert other.wait_for(0) not in keys[:2]
    for done in range(1, COUNT - 1):
        other.press("a")
        other.expect(other.progress).to_contain_text(f"carl · {done} of {COUNT - 2}")
    other.expect(other.page.locator("#picture")).to_contain_text("Of 12 texts 100% are good as they are (95% inter")
    assert sorted(line["id"] for tab in (anna, ben, other) for line in tab.said()) == sorted(map(str, range(COUNT)))


def test_words_stay_words_and_only_images_of_records_are_given_out(visit, serve, tmp_path, drawings):
    (drawings / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")

    def change(records):
        for record in records:
            record |= {"text": "A.", "refined": NASTY, "near_rules": [NASTY], "image": "0 #1%.png"}
        records[3] |= {"image": "page.svg", "near_rules": ["a", "b", "c"]}
        records[5] |= {"sha256": "0", "near_rules": ["a", "b"]}

    visitor = visit(serve(tmp_path / REVIEWS, change, order="worst"), "<i>*x*</i>")
    picture = visitor.page.locator("#picture")
    visitor.expect(picture).to_contain_text("page.svg: cannot be shown")
    visitor.press("s")
    visitor.expect(picture).to_contain_text("0 #1%.png: has changed")
    visitor.press("s")
    visitor.expect(visitor.image).to_be_visible()
    visitor.expect(visitor.text).to_have_value(NASTY)
    visitor.expect(visitor.changes).to_contain_text(" ".join(NASTY.split()))
    assert visitor.changes.locator("img, script, strong, code").count() == 0
    files = {"0 #1%.png": 200, "1 #1%.png": 404, "page.svg": 404, RECORDS: 404, "../0 #1%.png": 404}
    for name, status in files.items():
        url = f"{visitor.host}gradio_api/file={quote(str(drawings / name))}"
        assert visitor.context.request.get(url).status == status, name


def test_the_report_page_needs_nothing_else_and_fits(browser, drawings, pytestconfig):
    pictures, mini = pytestconfig.getoption("--pictures"), Path("output/mini/curation")
    if not (pictures and mini.is_dir()):  # for docs, where the mini world was curated
        mini = drawings
        write_report(CurationFolder(mini))
    context, asked, errors = browser.new_context(viewport={"width": 1280, "height": 1600}), [], []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.goto((mini / "report.html").absolute().as_uri())
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.locator("article img").count() > COUNT
    if pictures:
        page.screenshot(path=Path(pictures) / "curation_report.png")
    for details in page.locator("details").all():
        details.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()
