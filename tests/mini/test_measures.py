import math

import pytest

from minigpt4.mini.report import measure, named_things, shuffled, stated_order


def scene(background, layout, *things):
    return {"background": background, "layout": layout, "groups": [{"thing": t} for t in things]}


def test_names_are_found_in_plural_and_as_whole_words_only():
    assert named_things("Two Butterflies, a keyhole, catfish and a BUS.") == {"butterfly", "bus"}


def test_order_from_a_chain_and_from_places():
    assert stated_order("A cat to the left of a dog to the left of two buses.", "row") == {
        ("cat", "dog"),
        ("dog", "bus"),
    }
    assert stated_order("The owls on the left are small. The key on the right is large.", "row") == {("owl", "key")}
    assert stated_order("bus top, key middle, pear bottom", "column") == {
        ("bus", "key"),
        ("bus", "pear"),
        ("key", "pear"),
    }
    assert stated_order("a cat and a dog", "row") == set()


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


def test_an_order_that_names_a_thing_that_is_not_there_is_wrong():
    truth = {"a": scene("blue", "row", "cat", "dog")}
    assert measure({"a": "A cat to the left of a dog to the left of an owl."}, truth).left_right == 0.0
    assert measure({"a": "A cat and a dog."}, truth).left_right == 0.0


def test_nothing_to_judge_is_nan():
    result = measure({"a": ""}, {"a": scene("blue", "alone", "cat")})
    assert math.isnan(result.left_right)
    assert math.isnan(result.things_wrong)


def test_other_ids_than_the_scenes_are_an_error():
    with pytest.raises(ValueError, match="image ids"):
        measure({"a": ""}, {"b": scene("blue", "alone", "cat")})


def test_shuffling_moves_every_caption_and_loses_none():
    captions = {str(index): f"text {index}" for index in range(7)}
    moved = shuffled(captions)
    assert sorted(moved.values()) == sorted(captions.values())
    assert all(moved[key] != captions[key] for key in captions)
    with pytest.raises(ValueError, match="one image"):
        shuffled({"a": "text"})
