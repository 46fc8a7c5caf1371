"""`report.html`: nothing breaks out of its place, and, in Debian's Chromium, the gallery searches and sorts."""

import html
import json
import re

import numpy as np
import pytest
from PIL import Image

from minigpt4.evaluation.caption_data import CaptionItem
from minigpt4.evaluation.caption_run import MAX_IMAGES, gallery, page
from minigpt4.evaluation.report import Table

IMAGES = 60
NASTY = '</script><script>alert(1)</script><img src="http://example.com/x.png" onerror="alert(2)"> @DATA@ & "quoted"'
FACTS = {
    "images": IMAGES,
    "metrics": ["BLEU-1", "CIDEr", "ROUGE-L"],
    "notes": [NASTY],
    "prompt": NASTY,
    "checkpoints": [
        {"name": name, "file": f"{name}.pth", "sha256": "00", "card": {"llm": NASTY}} for name in ("first", "last")
    ],
}
# Of image n: CIDEr rises with n for the last checkpoint and falls for the first; ROUGE-L has its best at number 30.
RISING = np.arange(IMAGES) / IMAGES
HILL = 1 - np.abs(np.arange(IMAGES) - 30) / IMAGES
SCORES = [{"CIDEr": 1 - RISING, "ROUGE-L": HILL * 0}, {"CIDEr": RISING, "ROUGE-L": HILL}]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of 60 images and two checkpoints: caption 107 attacks, 108 is empty, file 109 is gone."""
    folder = tmp_path_factory.mktemp("report")
    Image.new("RGB", (400, 300), "red").save(folder / "picture.png")
    files = [folder / ("gone.png" if n == 9 else "picture.png") for n in range(IMAGES)]
    items = [CaptionItem(str(100 + n), file, answer="a") for n, file in enumerate(files)]
    references = {item.image_id: [f"A dog near house {item.image_id}."] for item in items}
    said = {item.image_id: f"A Cat on roof {number}." for number, item in enumerate(items)}
    captions = [said, {**said, "107": NASTY, "108": ""}]
    images = gallery(items, references, captions, SCORES)
    chart = (folder / "picture.png").read_bytes()
    file = folder / "report.html"
    file.write_text(page(NASTY, FACTS, {NASTY: Table([NASTY], [[NASTY]])}, chart, images), encoding="utf-8")
    return file


def test_texts_cannot_become_markup_come_back_unchanged_and_nothing_outside_is_named(report):
    text = report.read_text()
    assert len(re.findall("<script", text)) == 3  # the data, and those of all pages and of this one
    assert text.count(html.escape(NASTY)) >= 4
    assert NASTY not in text
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    attacked, gone = data["images"][7], data["images"][9]
    assert attacked["captions"] == ["A Cat on roof 7.", NASTY]
    assert attacked["scores"] == [[0.8833, 0.1167], [0.0, 0.6167]]
    assert attacked["picture"].startswith("data:image/jpeg;base64,")
    assert len(attacked["picture"]) < 10_000
    assert gone["picture"] == ""
    assert re.search(r"""content="default-src 'none'; img-src data:;""", text)
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"|@import|url\(', text) == []


def test_large_gallery_shows_best_and_worst(tmp_path):
    items = [CaptionItem(str(n), tmp_path / "none.jpg", answer="a") for n in range(MAX_IMAGES + 2)]
    said = {item.image_id: "a" for item in items}
    middle = {"400", "401"}
    scores = np.array([0.5 if item.image_id in middle else n % 2 for n, item in enumerate(items)])
    shown = gallery(items, {key: ["a"] for key in said}, [said], [{"CIDEr": scores}])
    assert len(shown) == MAX_IMAGES
    assert not middle & {image["id"] for image in shown}


# In a browser


@pytest.fixture(scope="module")
def opened(browser, report):
    """The open page, the addresses that it asked for, and script errors; all but its own file was refused."""
    own, requests, errors = report.resolve().as_uri(), [], []
    context = browser.new_context()
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.route("**/*", lambda route: route.continue_() if route.request.url == own else route.abort())
    page.goto(own)
    yield page, requests, errors
    context.close()


@pytest.fixture
def shown(opened, report):
    """The page as it opens; when the test is over, it must have asked for itself alone and made no error."""
    page, requests, errors = opened
    page.reload()
    yield page
    assert errors == []
    assert {address for address in requests if not address.startswith("data:")} == {report.resolve().as_uri()}


def _ids(page) -> list[str]:
    return page.locator("#gallery article small").all_inner_texts()


def _choose(page, **labels: str) -> None:
    for name, label in labels.items():
        page.locator(f"#{name}").select_option(label=label)


def test_gallery_begins_with_the_best_images_of_the_last_checkpoint_and_more_come_on_demand(shown):
    assert _ids(shown) == [str(100 + n) for n in range(59, 9, -1)]
    assert shown.locator("#count").inner_text() == "60 of 60 images"
    shown.locator("#more").click()
    assert len(_ids(shown)) == IMAGES
    assert shown.locator("#more").is_hidden()


def test_order_follows_the_choices(shown):
    rising, falling = ["159", "158", "157"], ["100", "101", "102"]
    for order, checkpoint, metric, first in (
        ("worst first", "last", "CIDEr", falling),
        ("worst first", "first", "CIDEr", rising),
        ("best first", "first", "CIDEr", falling),
        ("best first", "last", "ROUGE-L", ["130", "129", "131"]),
        ("order of the data", "last", "CIDEr", falling),
        ("most gained", "last", "CIDEr", rising),
        ("most lost", "last", "CIDEr", falling),
        ("most lost", "first", "CIDEr", falling),  # which no image loses against itself
    ):
        _choose(shown, order=order, checkpoint=checkpoint, metric=metric)
        assert _ids(shown)[:3] == first


def test_search_finds_ids_references_and_captions_in_the_order_that_was_chosen(shown):
    roofs = ["147", "137", "127", "117", "157", "107"]
    found = {"house 112.": ["112"], "CAT roof 7.": roofs, "alert(2)": ["107"], "(?!.*) [": [], "nothing like this": []}
    for words, ids in found.items():
        shown.locator("#search").fill(words)
        assert sorted(_ids(shown)) == sorted(ids)
        assert shown.locator("#count").inner_text() == f"{len(ids)} of 60 images"
    _choose(shown, order="worst first")
    shown.locator("#search").fill("house 15")
    assert _ids(shown) == ["115", *(str(n) for n in range(150, 160))]
    shown.locator("#search").fill("")
    assert shown.locator("#count").inner_text() == "60 of 60 images"


def test_image_is_shown_with_references_scores_and_captions_hostile_and_empty_ones_too(shown):
    card, says = shown.locator("#gallery article"), shown.locator("#gallery article td:not(.score)")
    shown.locator("#search").fill("alert(2)")
    assert says.all_inner_texts() == ["A Cat on roof 7.", NASTY]
    assert shown.locator("#gallery script, #gallery img[onerror]").count() == 0
    assert shown.locator("h1").inner_text() == NASTY
    shown.locator("#search").fill("108")
    assert card.locator("li").all_inner_texts() == ["A dog near house 108."]
    assert says.all_inner_texts() == ["A Cat on roof 8.", "(empty)"]
    assert card.locator("td.score").all_inner_texts() == ["CIDEr 0.87, ROUGE-L 0.00", "CIDEr 0.13, ROUGE-L 0.63"]
    assert card.locator("img").evaluate("image => image.complete && image.naturalWidth") == 208


def test_request_from_the_page_is_refused_by_its_policy(opened):
    page, requests, errors = opened
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => false, () => true)")
    assert any("Content Security Policy" in error for error in errors)
    assert [address for address in requests if "127.0.0.1" in address] == []
    errors.clear()
