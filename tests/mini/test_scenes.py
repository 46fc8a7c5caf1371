"""Scenes of the mini world: what they hold, what is said about them, and how they are drawn."""

import unicodedata
from itertools import combinations

import numpy as np
import pytest

from minigpt4.mini.report import measure, named_things
from minigpt4.mini.scenes import (
    ALONE,
    BACKGROUNDS,
    COLUMN,
    LARGE,
    ROW,
    SIDE,
    SMALL,
    THINGS,
    Group,
    Scene,
    Thing,
    alt_text,
    artwork,
    detailed_description,
    draw,
    five_captions,
    has_reserved_combination,
    is_new_combination,
    is_reserved_pair,
    reserved_background,
    sample_scene,
    sample_scenes,
    with_article,
)

NAMED = {thing.name: thing for thing in THINGS}
CAT, DOG, BUS = THINGS[0], THINGS[1], THINGS[50]
ROW_SCENE = Scene("orange", ROW, (Group(NAMED["cat"], 2, SMALL), Group(NAMED["owl"], 1, LARGE)), 0)
COLUMN_SCENE = Scene("blue", COLUMN, tuple(Group(NAMED[n], 1, SMALL) for n in ("bus", "key", "pear")), 0)
ALONE_SCENE = Scene("white", ALONE, (Group(NAMED["duck"], 3, LARGE),), 0)


# Things


def test_there_are_80_kinds_with_names_of_their_own_that_unicode_gives_and_no_background_has():
    assert len(NAMED) == 80
    assert all(unicodedata.lookup(thing.name.upper()) == chr(int(thing.code_point, 16)) for thing in THINGS)
    assert not set(BACKGROUNDS) & {word for thing in THINGS for word in thing.name.split()}


@pytest.mark.parametrize(
    ("name", "plural"),
    [("cat", "cats"), ("bus", "buses"), ("butterfly", "butterflies"), ("key", "keys"), ("snowman", "snowmen")],
)
def test_plurals_and_articles(name, plural):
    thing = Thing("1F408", name)
    assert (thing.counted(1), thing.counted(2)) == (name, plural)
    assert (with_article("owl"), with_article("cat")) == ("an owl", "a cat")


# Combinations


def test_the_same_seed_gives_the_same_scenes_on_every_machine_whatever_was_drawn_before():
    scenes = list(sample_scenes("train", 5, seed=3))
    assert scenes[4] == sample_scene("train", 4, seed=3)
    assert scenes != list(sample_scenes("train", 5, seed=4))
    assert sample_scene("test", 0, seed=0).record() == {
        "background": "green",
        "layout": "alone",
        "groups": [{"thing": "rooster", "count": 1, "size": "large"}],
    }


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_held_out_scene_has_a_combination_that_no_training_scene_has(split):
    train = list(sample_scenes("train", 3000, seed=0))
    pairs = {frozenset(p) for s in train for p in combinations([g.thing for g in s.groups], 2)}
    grounds = {(g.thing, s.background) for s in train for g in s.groups}
    for scene in sample_scenes(split, 200, seed=0):
        own_pairs = {frozenset(p) for p in combinations([g.thing for g in scene.groups], 2)}
        own_grounds = {(g.thing, scene.background) for g in scene.groups}
        assert own_pairs - pairs if scene.layout != ALONE else own_grounds - grounds
        assert is_new_combination(scene)


def test_training_holds_no_reserved_combination_and_every_kind_on_all_but_one_background():
    seen = {thing: set() for thing in THINGS}
    for scene in sample_scenes("train", 6000, seed=0):
        assert not has_reserved_combination(scene)
        for group in scene.groups:
            seen[group.thing].add(scene.background)
    assert all(len(colours) == 7 and reserved_background(thing) not in colours for thing, colours in seen.items())


def test_about_one_pair_in_eight_is_reserved_in_either_order():
    pairs = list(combinations(THINGS, 2))
    assert 0.1 < sum(is_reserved_pair(*pair) for pair in pairs) / len(pairs) < 0.15
    assert all(is_reserved_pair(a, b) == is_reserved_pair(b, a) for a, b in pairs)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_split_has_as_many_full_scenes_as_any_other(split):
    numbers = [len(scene.groups) for scene in sample_scenes(split, 2000, seed=0)]
    assert [numbers.count(number) / 2000 for number in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.4], abs=0.04)


# Captions


def test_captions_of_every_layout():
    assert five_captions(ROW_SCENE) == [
        "Two cats to the left of an owl on an orange background.",
        "Two cats to the left of an owl.",
        "Two small cats to the left of a large owl.",
        "A picture of two cats and an owl.",
        "An orange background with two cats and an owl.",
    ]
    assert five_captions(COLUMN_SCENE)[3] == "A picture of a bus, a key and a pear."
    assert alt_text(COLUMN_SCENE) == "A bus above a key above a pear on a blue background."
    assert detailed_description(ALONE_SCENE) == "Three ducks on a white background. The ducks in the middle are large."


@pytest.mark.parametrize("write", [detailed_description, lambda scene: " ".join(five_captions(scene))])
def test_every_text_is_true_by_the_measures(write):
    scenes = {str(index): scene for index, scene in enumerate(sample_scenes("test", 300, seed=0))}
    result = measure({i: write(s) for i, s in scenes.items()}, {i: s.record() for i, s in scenes.items()})
    assert result.things_named == result.background == result.left_right == result.above_below == 1.0
    assert result.things_wrong == 0.0
    for scene in scenes.values():
        assert named_things(alt_text(scene)) == {group.thing.name for group in scene.groups}


# Pictures


def middle(pasted, index):
    boxes = [(corner, drawing.size) for group, drawing, corner in pasted if group == index]
    return np.mean([[c + s / 2 for c, s in zip(corner, size, strict=True)] for corner, size in boxes], axis=0)


def test_every_kind_has_a_drawing_with_ink():
    for thing in THINGS:
        drawing = artwork(thing)
        assert drawing.mode == "RGBA"
        assert np.asarray(drawing.getchannel("A")).mean() > 10, thing.name


@pytest.mark.parametrize(("layout", "axis"), [(ROW, 0), (COLUMN, 1)])
def test_groups_stand_in_the_order_of_the_layout(layout, axis):
    for seed in range(20):
        scene = Scene("blue", layout, (Group(CAT, 1, LARGE), Group(DOG, 1, SMALL), Group(BUS, 1, LARGE)), seed)
        places = [middle(draw(scene)[1], index)[axis] for index in range(3)]
        assert places[0] + SIDE / 5 < places[1] < places[2] - SIDE / 5
    assert draw(scene)[0].tobytes() == draw(scene)[0].tobytes()


def test_as_many_things_are_drawn_as_the_scene_says_inside_the_picture_and_small_ones_are_smaller():
    sizes = {SMALL: [], LARGE: []}
    for scene in sample_scenes("train", 300, seed=0):
        picture, pasted = draw(scene)
        assert picture.size == (SIDE, SIDE)
        assert len(pasted) == scene.count
        for index, drawing, (left, top) in pasted:
            assert left >= 0 <= top
            assert left + drawing.width <= SIDE >= top + drawing.height
            sizes[scene.groups[index].size].append(max(drawing.size))
    assert max(sizes[SMALL]) < min(sizes[LARGE])


def test_the_corner_has_the_background_colour_within_its_shade():
    for name, colour in BACKGROUNDS.items():
        picture, _ = draw(Scene(name, ALONE, (Group(CAT, 1, SMALL),), seed=1))
        assert np.abs(np.array(picture.getpixel((1, 1))) - colour).max() <= 8
