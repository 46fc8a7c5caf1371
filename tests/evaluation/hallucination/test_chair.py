"""CHAIR with numbers computed by hand, and on mini scenes, whose truth is known exactly."""

import json

import pytest

from minigpt4.evaluation.hallucination import ObjectNames, Truth, chair_scores, compare, read_truth, wrong_captions
from minigpt4.mini.report import measure
from minigpt4.mini.scenes import THINGS, alt_text, detailed_description, five_captions, sample_scenes

SCENES = {str(1000 + number): scene for number, scene in enumerate(sample_scenes("test", 60, seed=3))}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Truth:
    path = tmp_path_factory.mktemp("mini") / "scenes_test.json"
    path.write_text(json.dumps({image_id: scene.record() for image_id, scene in SCENES.items()}))
    return read_truth(path)


def _other_thing(scene) -> str:
    """A thing that a scene does not show."""
    shown = {group.thing for group in scene.groups}
    return next(thing.name for thing in THINGS if thing not in shown)


# By hand


def test_scores_by_hand():
    names = ObjectNames({"dog": ["puppy"], "cat": [], "cup": [], "table": []})
    truth = Truth({"1": frozenset({"dog", "cup"}), "2": frozenset({"cat"}), "3": frozenset({"table"})}, names)
    captions = {
        "1": "A dog, a puppy and a cat look at the cat.",  # dog dog cat cat: 2 of 4 wrong; once: 1 of 2; 1 of 2 found
        "2": "A cat sleeps.",  # 1 right; 1 of 1 found
        "3": "Nothing to see here.",  # 0 of 1 found
    }
    found = chair_scores(compare(captions, truth))
    assert found["scores"] == pytest.approx(
        {
            "CHAIR-i": 2 / 5,
            "CHAIR-s": 1 / 3,
            "CHAIR-i (once)": 1 / 3,
            "recall": 2 / 4,
            "F1": 4 / 7,  # of precision 2/3 and recall 1/2
            "words": (11 + 3 + 4) / 3,
        }
    )
    assert found["counts"] == {
        "captions": 3,
        "captions_wrong": 1,
        "mentions": 5,
        "mentions_wrong": 2,
        "objects_named": 3,
        "objects_right": 2,
        "objects_shown": 4,
    }
    assert wrong_captions(compare(captions, truth), captions) == [
        {"image_id": "1", "caption": captions["1"], "wrong": ["cat"], "shown": ["cup", "dog"]}
    ]


def test_captions_without_objects_have_no_share_of_wrong_ones():
    truth = Truth({"1": frozenset({"dog"})}, ObjectNames({"dog": []}))
    found = chair_scores(compare({"1": ""}, truth))
    assert (found["scores"]["CHAIR-i"], found["scores"]["CHAIR-s"], found["scores"]["recall"]) == (None, 0.0, 0.0)
    assert "CHAIR-i" not in found["intervals"]


# The mini world


@pytest.mark.parametrize("style", range(5))
def test_true_captions_of_every_style_have_no_wrong_objects(scenes, style):
    captions = {image_id: five_captions(scene)[style] for image_id, scene in SCENES.items()}
    scores = chair_scores(compare(captions, scenes))["scores"]
    assert (scores["CHAIR-i"], scores["CHAIR-s"], scores["recall"], scores["F1"]) == (0, 0, 1, 1)


def test_true_detailed_descriptions_have_no_wrong_objects(scenes):
    captions = {image_id: detailed_description(scene) for image_id, scene in SCENES.items()}
    found = chair_scores(compare(captions, scenes))
    assert found["scores"]["CHAIR-i"] == 0
    assert found["counts"]["mentions"] == 2 * sum(len(scene.groups) for scene in SCENES.values())


def test_a_false_thing_in_every_third_caption_is_found_exactly(scenes):
    captions = {image_id: alt_text(scene) for image_id, scene in SCENES.items()}
    altered = list(SCENES)[::3]
    for image_id in altered:
        captions[image_id] += f" with a {_other_thing(SCENES[image_id])}"
    images = compare(captions, scenes)
    found = chair_scores(images)
    things = sum(len(scene.groups) for scene in SCENES.values())
    assert found["scores"]["CHAIR-s"] == len(altered) / len(SCENES) == 1 / 3
    assert found["scores"]["CHAIR-i"] == len(altered) / (things + len(altered))
    assert found["scores"]["recall"] == 1
    assert [entry["image_id"] for entry in wrong_captions(images, captions)] == altered
    low, high = found["intervals"]["CHAIR-i"]
    assert low < found["scores"]["CHAIR-i"] < high


def test_captions_of_other_scenes_are_judged_as_the_mini_measures_do(scenes):
    ids = list(SCENES)
    captions = {image_id: alt_text(SCENES[other]) for image_id, other in zip(ids, ids[1:] + ids[:1], strict=True)}
    scores = chair_scores(compare(captions, scenes))["scores"]
    measured = measure(captions, {image_id: scene.record() for image_id, scene in SCENES.items()})
    assert scores["CHAIR-i (once)"] == pytest.approx(measured.things_wrong)
    assert scores["recall"] == pytest.approx(measured.things_named)
    assert scores["CHAIR-i"] > 0.8
