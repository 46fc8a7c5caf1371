import numpy as np
import pytest

from minigpt4.mini.captions import alt_text, detailed_description, five_captions
from minigpt4.mini.measures import measure, named_things
from minigpt4.mini.scenes import ALONE, COLUMN, LARGE, ROW, SMALL, Group, Scene, sample_scenes
from minigpt4.mini.things import THINGS

NAMED = {thing.name: thing for thing in THINGS}
ROW_SCENE = Scene("orange", ROW, (Group(NAMED["cat"], 2, SMALL), Group(NAMED["owl"], 1, LARGE)), 0)
COLUMN_SCENE = Scene("blue", COLUMN, tuple(Group(NAMED[n], 1, SMALL) for n in ("bus", "key", "pear")), 0)
ALONE_SCENE = Scene("white", ALONE, (Group(NAMED["duck"], 3, LARGE),), 0)


def test_five_captions_of_a_row():
    assert five_captions(ROW_SCENE) == [
        "Two cats and an owl on an orange background.",
        "Two cats to the left of an owl.",
        "Two small cats, one large owl.",
        "Orange background, cats left, owl right.",
        "Three things on orange.",
    ]


def test_five_captions_of_a_column():
    captions = five_captions(COLUMN_SCENE)
    assert captions[1] == "A bus above a key above a pear."
    assert captions[3] == "Blue background, bus top, key middle, pear bottom."


def test_a_detailed_description_has_several_sentences():
    assert detailed_description(ALONE_SCENE) == (
        "The picture shows three ducks on a plain white background. The ducks in the middle are large. "
        "There are three things in the picture."
    )


def test_alt_texts_have_all_four_forms_and_fit_the_32_tokens_of_stage_1():
    texts = {alt_text(COLUMN_SCENE, np.random.default_rng(seed)) for seed in range(100)}
    assert texts == {
        "a small bus at the top, a small key in the middle, a small pear at the bottom, blue background",
        "a bus above a key above a pear, on blue",
        "a small bus, a small key and a small pear on a blue background",
        "blue picture of a bus, a key and a pear",
    }


@pytest.mark.parametrize("write", [detailed_description, lambda scene: " ".join(five_captions(scene))])
def test_every_text_is_true_by_the_measures(write):
    scenes = {str(index): scene for index, scene in enumerate(sample_scenes("test", 300, seed=0))}
    result = measure({i: write(s) for i, s in scenes.items()}, {i: s.record() for i, s in scenes.items()})
    assert result.things_named == result.background == result.left_right == result.above_below == 1.0
    assert result.things_wrong == 0.0


def test_alt_texts_name_all_things():
    for index, scene in enumerate(sample_scenes("train", 300, seed=0)):
        text = alt_text(scene, np.random.default_rng(index))
        assert named_things(text) == {group.thing.name for group in scene.groups}
