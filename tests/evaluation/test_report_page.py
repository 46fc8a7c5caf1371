"""`report.html`: nothing in it can break out of its place, and it asks for nothing outside itself."""

import html
import json
import re

import numpy as np
import pytest
from PIL import Image

from minigpt4.evaluation.caption_data import CaptionItem
from minigpt4.evaluation.report import MAX_IMAGES, Table, gallery, page

NASTY = '</script><script>alert(1)</script><img src="http://example.com/x.png"> @DATA@ $title & "quoted"'
FACTS = {
    "images": 2,
    "metrics": ["BLEU-1", "CIDEr"],
    "notes": [NASTY],
    "prompt": NASTY,
    "checkpoints": [{"name": NASTY, "file": "a.pth", "sha256": "00", "card": {"llm": NASTY}}],
}


@pytest.fixture
def items(tmp_path) -> list[CaptionItem]:
    Image.new("RGB", (400, 300), "red").save(tmp_path / "1.jpg")
    return [CaptionItem(str(n), tmp_path / f"{n}.jpg", answer=NASTY) for n in (1, 2)]


@pytest.fixture
def text(items) -> str:
    references = {item.image_id: [NASTY] for item in items}
    captions = [{item.image_id: NASTY for item in items}]
    images = gallery(items, references, captions, [{"CIDEr": np.array([0.5, 0.25])}])
    return page(NASTY, FACTS, {NASTY: Table([NASTY], [[NASTY]])}, b"png", images)


def _data(text: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


def test_texts_of_the_data_come_back_unchanged(text):
    (first, second) = _data(text)["images"]
    assert first["references"] == first["captions"] == [NASTY]
    assert (first["scores"], second["scores"]) == ([[0.5]], [[0.25]])
    assert _data(text)["checkpoints"] == [NASTY]


def test_texts_cannot_become_markup(text):
    assert len(re.findall("<script", text)) == 2  # the data and the page's own
    assert text.count(html.escape(NASTY)) >= 4
    assert NASTY not in text


def test_page_asks_for_nothing_outside_itself(text):
    assert re.search(r"""content="default-src 'none'; img-src data:;""", text)
    outside = re.findall(r'(?:src|href)="(?!data:)[^"]*"|@import|url\(', text)
    assert outside == []


def test_pictures_are_small_and_a_missing_file_leaves_none(text):
    first, second = (image["picture"] for image in _data(text)["images"])
    assert first.startswith("data:image/jpeg;base64,")
    assert len(first) < 10_000
    assert second == ""


def test_large_gallery_shows_best_and_worst(tmp_path):
    items = [CaptionItem(str(n), tmp_path / "none.jpg", "a", None) for n in range(MAX_IMAGES + 2)]
    references = {item.image_id: ["a"] for item in items}
    captions = [{item.image_id: "a" for item in items}]
    middle = {"400", "401"}
    scores = np.array([0.5 if item.image_id in middle else n % 2 for n, item in enumerate(items)])
    shown = gallery(items, references, captions, [{"CIDEr": scores}])
    assert len(shown) == MAX_IMAGES
    assert not middle & {image.id for image in shown}
