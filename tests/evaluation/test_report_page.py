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
def text(tmp_path) -> str:
    Image.new("RGB", (400, 300), "red").save(tmp_path / "1.jpg")
    items = [CaptionItem(str(n), tmp_path / f"{n}.jpg", answer=NASTY) for n in (1, 2)]
    images = gallery(
        items, {"1": [NASTY], "2": [NASTY]}, [{"1": NASTY, "2": NASTY}], [{"CIDEr": np.array([0.5, 0.25])}]
    )
    return page(NASTY, FACTS, {NASTY: Table([NASTY], [[NASTY]])}, b"png", images)


def test_texts_cannot_become_markup_and_come_back_unchanged(text):
    assert len(re.findall("<script", text)) == 2  # the data and the page's own
    assert text.count(html.escape(NASTY)) >= 4
    assert NASTY not in text
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    (first, second) = data["images"]
    assert first["references"] == first["captions"] == data["checkpoints"] == [NASTY]
    assert (first["scores"], second["scores"]) == ([[0.5]], [[0.25]])
    assert first["picture"].startswith("data:image/jpeg;base64,")
    assert len(first["picture"]) < 10_000
    assert second["picture"] == ""  # its file is gone


def test_page_asks_for_nothing_outside_itself(text):
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
