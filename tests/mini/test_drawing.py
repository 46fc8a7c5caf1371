import numpy as np
import pytest

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
    artwork,
    draw,
    sample_scenes,
)

CAT, DOG, BUS = THINGS[0], THINGS[1], THINGS[50]


def middle(pasted, index):
    boxes = [(corner, drawing.size) for group, drawing, corner in pasted if group == index]
    return np.mean([[c + s / 2 for c, s in zip(corner, size, strict=True)] for corner, size in boxes], axis=0)


def test_every_kind_has_a_drawing_with_ink():
    for thing in THINGS:
        drawing = artwork(thing)
        assert drawing.mode == "RGBA"
        assert np.asarray(drawing.getchannel("A")).mean() > 10, thing.name


def test_a_scene_is_drawn_the_same_twice():
    scene = next(sample_scenes("train", 1, seed=5))
    assert draw(scene)[0].tobytes() == draw(scene)[0].tobytes()


@pytest.mark.parametrize(("layout", "axis"), [(ROW, 0), (COLUMN, 1)])
def test_groups_stand_in_the_order_of_the_layout(layout, axis):
    for seed in range(20):
        scene = Scene("blue", layout, (Group(CAT, 1, LARGE), Group(DOG, 1, SMALL), Group(BUS, 1, LARGE)), seed)
        places = [middle(draw(scene)[1], index)[axis] for index in range(3)]
        assert places[0] + SIDE / 5 < places[1] < places[2] - SIDE / 5


def test_as_many_things_are_drawn_as_the_scene_says_and_none_leaves_the_picture():
    for scene in sample_scenes("train", 200, seed=0):
        picture, pasted = draw(scene)
        assert picture.size == (SIDE, SIDE)
        assert len(pasted) == scene.count
        for _, drawing, (left, top) in pasted:
            assert left >= 0 <= top
            assert left + drawing.width <= SIDE >= top + drawing.height


def test_small_things_are_smaller_than_large_ones_in_every_scene():
    sizes = {SMALL: [], LARGE: []}
    for scene in sample_scenes("train", 300, seed=0):
        for index, drawing, _ in draw(scene)[1]:
            sizes[scene.groups[index].size].append(max(drawing.size))
    assert max(sizes[SMALL]) < min(sizes[LARGE])


def test_the_corner_has_the_background_colour_within_its_shade():
    for name, colour in BACKGROUNDS.items():
        picture, _ = draw(Scene(name, ALONE, (Group(CAT, 1, SMALL),), seed=1))
        assert np.abs(np.array(picture.getpixel((1, 1))) - colour).max() <= 8
