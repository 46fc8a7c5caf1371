"""What images show, read from every form."""

import json

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.evaluation.hallucination import read_truth

INSTANCES = {
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "images": [{"id": 42, "file_name": "COCO_val2014_42.jpg"}, {"id": 7, "file_name": "7.jpg"}],
    "annotations": [
        {"image_id": 42, "category_id": 18},
        {"image_id": 42, "category_id": 18},
        {"image_id": 42, "category_id": 1},
    ],
}
SCENE = {"background": "pink", "layout": "row", "groups": [{"thing": "hot dog"}, {"thing": "cat"}]}


@pytest.fixture
def read(tmp_path):
    def read(content, synonyms=None):
        (tmp_path / "truth.json").write_text(json.dumps(content))
        if synonyms is not None:
            (tmp_path / "words.txt").write_text(synonyms)
        return read_truth(tmp_path / "truth.json", tmp_path / "words.txt" if synonyms else None)

    return read


def test_lists_take_coco_names_and_their_synonyms(read):
    truth = read({"42": ["puppy", "Dog", "man"], "7": []})
    assert truth.objects == {"42": {"dog", "person"}, "7": set()}
    assert truth.files == {}


def test_entries_may_name_their_files(read):
    truth = read({"42": {"objects": ["dog"], "file": "42.png"}})
    assert (truth.objects, truth.files) == ({"42": {"dog"}}, {"42": "42.png"})


def test_coco_instances_keep_images_without_objects(read):
    truth = read(INSTANCES)
    assert truth.objects == {"42": {"dog", "person"}, "7": set()}
    assert truth.files == {"42": "COCO_val2014_42.jpg", "7": "7.jpg"}


def test_mini_scenes_use_the_things_of_the_mini_world(read):
    truth = read({"1000840": {**SCENE, "groups": [{"thing": "cat"}, {"thing": "owl"}]}})
    assert truth.objects == {"1000840": {"cat", "owl"}}
    assert len(truth.names.names) == 80


def test_own_synonyms_go_before_the_shipped_ones(read):
    assert read({"1": ["unicorn"]}, "unicorn: horned horse\n").objects == {"1": {"unicorn"}}


def test_captions_by_people_add_their_objects(read):
    truth = read({"42": ["dog"], "7": ["cat"]}).with_captions({"42": ["A man", "a dog"], "7": ["Nothing"]})
    assert truth.objects == {"42": {"dog", "person"}, "7": {"cat"}}


def test_images_without_captions_are_named(read):
    with pytest.raises(SampleError, match="1 of 2 images have no captions: '7'"):
        read({"42": ["dog"], "7": ["cat"]}).with_captions({"42": ["A man"]})


def test_unknown_object_is_named_with_the_way_out(read):
    with pytest.raises(ConfigError, match=r"truth\.json: 1 of its objects .*'unicorn'; give --synonyms"):
        read({"42": ["dog", "unicorn"]})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"42": "dog"}, "image 42: expected a list of names"),
        ([1], "expected"),
        ({}, "holds no image"),
        ({**INSTANCES, "annotations": [{"image_id": 42, "caption": "A dog"}]}, "lacks 'category_id'"),
        ({"1": {"groups": [{"count": 2}]}}, "a scene lacks 'thing'"),
    ],
    ids=str,
)
def test_bad_truth_is_named(read, content, words):
    with pytest.raises((ConfigError, SampleError), match=rf"truth\.json.*{words}"):
        read(content)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"truth\.json: cannot be read"):
        read_truth(tmp_path / "truth.json")
    (tmp_path / "truth.json").write_text("{")
    with pytest.raises(ConfigError, match=r"truth\.json: not JSON"):
        read_truth(tmp_path / "truth.json")
