"""Whether captions are true, and the quickstart's figure."""

import math

import pytest
from PIL import Image

from minigpt4.mini.report import draw_figure, lost, measure, named_things, shuffled, stated_order


def scene(background, layout, *things):
    return {"background": background, "layout": layout, "groups": [{"thing": t} for t in things]}


def test_names_are_found_in_plural_and_as_whole_words_only():
    assert named_things("Two Butterflies, a keyhole, catfish and a BUS.") == {"butterfly", "bus"}


@pytest.mark.parametrize(
    ("text", "layout", "pairs"),
    [
        ("A cat to the left of a dog to the left of two buses.", "row", {("cat", "dog"), ("dog", "bus")}),
        ("The owls on the left are small. The key on the right is large.", "row", {("owl", "key")}),
        ("bus top, key middle, pear bottom", "column", {("bus", "key"), ("bus", "pear"), ("key", "pear")}),
        ("a cat and a dog", "row", set()),
    ],
)
def test_order_is_read_from_a_chain_and_from_places(text, layout, pairs):
    assert stated_order(text, layout) == pairs


def test_measures_by_hand():
    truth = {
        "a": scene("blue", "row", "cat", "dog"),
        "b": scene("pink", "row", "owl", "key", "bus"),
        "c": scene("white", "column", "pear", "duck"),
        "d": scene("gray", "alone", "tent"),
    }
    captions = {
        "a": "A cat to the left of a dog on a blue background.",
        "b": "A key to the left of an owl on a pink and white background.",  # wrong order, no bus, two colours
        "c": "A pear above a swan on white.",  # no duck, but a swan
        "d": "",
    }
    result = measure(captions, truth)
    assert result.things_named == pytest.approx(5 / 8)
    assert result.things_wrong == pytest.approx(1 / 6)
    assert result.background == pytest.approx(2 / 4)
    assert result.left_right == pytest.approx(1 / 2)
    assert result.above_below == 0.0
    one = {"a": truth["a"]}
    assert measure({"a": "A cat to the left of a dog to the left of an owl."}, one).left_right == 0.0
    assert measure({"a": "A cat and a dog."}, one).left_right == 0.0
    nothing = measure({"d": ""}, {"d": truth["d"]})
    assert math.isnan(nothing.left_right)
    assert math.isnan(nothing.things_wrong)
    with pytest.raises(ValueError, match="image ids"):
        measure({"a": ""}, {"b": truth["b"]})


def test_shuffling_moves_every_caption_and_costs_a_share_of_the_score_unless_that_is_chance():
    captions = {str(index): f"text {index}" for index in range(7)}
    moved = shuffled(captions)
    assert sorted(moved.values()) == sorted(captions.values())
    assert all(moved[key] != captions[key] for key in captions)
    with pytest.raises(ValueError, match="one image"):
        shuffled({"a": "text"})
    assert lost(2.0, 0.5) == pytest.approx(0.75)
    assert math.isnan(lost(0.0, 0.0))
    assert math.isnan(lost(0.001, 0.2))


def test_the_figure_shows_the_first_scenes_with_their_captions(tmp_path):
    captions = {f"{number}": f"caption {number}" for number in range(8)}
    for image_id in captions:
        Image.new("RGB", (224, 224), "red").save(tmp_path / f"{image_id}.jpg")
    draw_figure(tmp_path / "figure.png", tmp_path, captions)
    with Image.open(tmp_path / "figure.png") as figure:
        centres = [(16 + column * 240 + 100, 16 + row * 374 + 100) for column in range(3) for row in range(2)]
        colours = [figure.getpixel(centre) for centre in centres]
    assert all(red > 200 and blue < 60 for red, _, blue in colours)
