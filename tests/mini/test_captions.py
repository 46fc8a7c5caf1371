import pytest

from minigpt4.mini.report import measure, named_things
from minigpt4.mini.scenes import (
    ALONE,
    COLUMN,
    LARGE,
    ROW,
    SMALL,
    THINGS,
    Group,
    Scene,
    alt_text,
    detailed_description,
    five_captions,
    sample_scenes,
)

NAMED = {thing.name: thing for thing in THINGS}
ROW_SCENE = Scene("orange", ROW, (Group(NAMED["cat"], 2, SMALL), Group(NAMED["owl"], 1, LARGE)), 0)
COLUMN_SCENE = Scene("blue", COLUMN, tuple(Group(NAMED[n], 1, SMALL) for n in ("bus", "key", "pear")), 0)
ALONE_SCENE = Scene("white", ALONE, (Group(NAMED["duck"], 3, LARGE),), 0)


def test_five_captions_of_a_row():
    assert five_captions(ROW_SCENE) == [
        "Two cats to the left of an owl on an orange background.",
        "Two cats to the left of an owl.",
        "Two small cats to the left of a large owl.",
        "A picture of two cats and an owl.",
        "An orange background with two cats and an owl.",
    ]


def test_five_captions_of_a_column():
    captions = five_captions(COLUMN_SCENE)
    assert captions[1] == "A bus above a key above a pear."
    assert captions[3] == "A picture of a bus, a key and a pear."


def test_a_detailed_description_has_several_sentences():
    assert detailed_description(ALONE_SCENE) == (
        "Three ducks on a white background. The ducks in the middle are large."
    )


def test_an_alt_text_says_what_is_where():
    assert alt_text(COLUMN_SCENE) == "A bus above a key above a pear on a blue background."
    assert alt_text(ALONE_SCENE) == "Three ducks on a white background."


@pytest.mark.parametrize("write", [detailed_description, lambda scene: " ".join(five_captions(scene))])
def test_every_text_is_true_by_the_measures(write):
    scenes = {str(index): scene for index, scene in enumerate(sample_scenes("test", 300, seed=0))}
    result = measure({i: write(s) for i, s in scenes.items()}, {i: s.record() for i, s in scenes.items()})
    assert result.things_named == result.background == result.left_right == result.above_below == 1.0
    assert result.things_wrong == 0.0


def test_alt_texts_name_all_things():
    for scene in sample_scenes("train", 300, seed=0):
        assert named_things(alt_text(scene)) == {group.thing.name for group in scene.groups}
