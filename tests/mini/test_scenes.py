from itertools import combinations

import pytest

from minigpt4.mini.scenes import (
    ALONE,
    THINGS,
    has_reserved_combination,
    is_new_combination,
    is_reserved_pair,
    reserved_background,
    sample_scene,
    sample_scenes,
)


def test_the_same_seed_gives_the_same_scenes_whatever_was_drawn_before():
    scenes = list(sample_scenes("train", 5, seed=3))
    assert scenes[4] == sample_scene("train", 4, seed=3)
    assert scenes != list(sample_scenes("train", 5, seed=4))


def test_scene_zero_of_seed_zero_is_the_same_on_every_machine():
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


def test_training_scenes_hold_no_reserved_combination():
    assert not any(has_reserved_combination(scene) for scene in sample_scenes("train", 2000, seed=0))


def test_about_one_pair_in_eight_is_reserved_in_either_order():
    pairs = list(combinations(THINGS, 2))
    share = sum(is_reserved_pair(*pair) for pair in pairs) / len(pairs)
    assert 0.1 < share < 0.15
    assert all(is_reserved_pair(a, b) == is_reserved_pair(b, a) for a, b in pairs)


def test_every_kind_appears_in_training_beside_others_and_on_all_but_one_background():
    seen = {thing: set() for thing in THINGS}
    for scene in sample_scenes("train", 6000, seed=0):
        for group in scene.groups:
            seen[group.thing].add(scene.background)
    assert all(len(colours) == 7 and reserved_background(thing) not in colours for thing, colours in seen.items())


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_split_has_as_many_full_scenes_as_any_other(split):
    numbers = [len(scene.groups) for scene in sample_scenes(split, 2000, seed=0)]
    assert [numbers.count(number) / 2000 for number in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.4], abs=0.04)
