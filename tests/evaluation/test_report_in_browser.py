"""`report.html` in a real browser: its gallery searches and sorts, hostile captions stay text, nothing is asked for."""

import numpy as np
import pytest
from PIL import Image

from minigpt4.evaluation.caption_data import CaptionItem
from minigpt4.evaluation.report import Table, gallery, page

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
    """A report of 60 images and two checkpoints; the caption of number 7 attacks, that of number 8 is empty."""
    folder = tmp_path_factory.mktemp("report")
    Image.new("RGB", (400, 300), "red").save(folder / "picture.png")
    items = [CaptionItem(str(100 + n), folder / "picture.png", answer="a") for n in range(IMAGES)]
    references = {item.image_id: [f"A dog near house {item.image_id}."] for item in items}
    said = {item.image_id: f"A Cat on roof {number}." for number, item in enumerate(items)}
    captions = [said, {**said, "107": NASTY, "108": ""}]
    images = gallery(items, references, captions, SCORES)
    chart = (folder / "picture.png").read_bytes()
    file = folder / "report.html"
    file.write_text(page(NASTY, FACTS, {NASTY: Table([NASTY], [[NASTY]])}, chart, images), encoding="utf-8")
    return file


@pytest.fixture
def shown(watched, report):
    """The open report; when the test is over, it must have asked for itself alone and made no error."""
    watched.open(report)
    yield watched.page
    assert watched.errors == []
    outside = [address for address in watched.requests if not address.startswith("data:")]
    assert outside == [report.resolve().as_uri()]


def _ids(page) -> list[str]:
    return page.locator("#gallery article small").all_inner_texts()


def _choose(page, **labels: str) -> None:
    for name, label in labels.items():
        page.locator(f"#{name}").select_option(label=label)


def test_gallery_begins_with_the_best_images_of_the_last_checkpoint(shown):
    assert _ids(shown) == [str(100 + n) for n in range(59, 9, -1)]
    assert shown.locator("#count").inner_text() == "60 of 60 images"


def test_more_images_come_on_demand(shown):
    shown.locator("#more").click()
    assert len(_ids(shown)) == IMAGES
    assert shown.locator("#more").is_hidden()


@pytest.mark.parametrize(
    ("labels", "first"),
    [
        ({"order": "worst first"}, ["100", "101", "102"]),
        ({"checkpoint": "first"}, ["100", "101", "102"]),
        ({"metric": "ROUGE-L"}, ["130", "129", "131"]),
        ({"order": "most gained"}, ["159", "158", "157"]),
        ({"order": "most lost"}, ["100", "101", "102"]),
        ({"order": "order of the data"}, ["100", "101", "102"]),
        ({"order": "worst first", "checkpoint": "first"}, ["159", "158", "157"]),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_order_follows_the_choices(shown, labels, first):
    _choose(shown, **labels)
    assert _ids(shown)[:3] == first


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("house 112.", ["112"]),
        ("CAT roof 7.", ["147", "137", "127", "117", "157", "107"]),
        ("alert(2)", ["107"]),
        ("(?!.*) [", []),
        ("nothing like this", []),
    ],
)
def test_search_finds_ids_references_and_captions(shown, words, found):
    shown.locator("#search").fill(words)
    assert sorted(_ids(shown)) == sorted(found)
    assert shown.locator("#count").inner_text() == f"{len(found)} of 60 images"


def test_search_and_order_work_together_and_clearing_brings_all_back(shown):
    _choose(shown, order="worst first")
    shown.locator("#search").fill("house 15")
    assert _ids(shown) == ["115", *(str(n) for n in range(150, 160))]
    shown.locator("#search").fill("")
    assert shown.locator("#count").inner_text() == "60 of 60 images"


def test_hostile_caption_is_shown_as_text(shown):
    shown.locator("#search").fill("alert(2)")
    said = shown.locator("#gallery article table.says td:not(.score)").all_inner_texts()
    assert said == ["A Cat on roof 7.", NASTY]
    assert shown.locator("#gallery script, #gallery img[onerror]").count() == 0
    assert shown.locator("h1").inner_text() == NASTY


def test_image_is_shown_with_references_scores_and_empty_captions(shown):
    shown.locator("#search").fill("108")
    card = shown.locator("#gallery article")
    assert card.locator("li").all_inner_texts() == ["A dog near house 108."]
    assert card.locator("td:not(.score)").all_inner_texts() == ["A Cat on roof 8.", "(empty)"]
    assert card.locator("td.score").all_inner_texts() == ["CIDEr 0.87, ROUGE-L 0.00", "CIDEr 0.13, ROUGE-L 0.63"]
    assert card.locator("img").evaluate("image => image.complete && image.naturalWidth") == 208


def test_request_from_the_page_is_refused_by_its_policy(watched, report):
    watched.open(report)
    refused = watched.page.evaluate("fetch('http://127.0.0.1:9/').then(() => false, () => true)")
    assert refused
    assert any("Content Security Policy" in error for error in watched.errors)
    assert [address for address in watched.requests if "127.0.0.1" in address] == []
