"""Objects that texts name, by the shipped lists and others, and objects that images show, from every form."""

import json

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.evaluation.hallucination import COCO_OBJECTS, MINI_OBJECTS, ObjectNames, read_synonyms, read_truth
from minigpt4.mini.scenes import THINGS

COCO = (  # the 80 names of the published annotations
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign "
    "parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella "
    "handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard "
    "surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange "
    "broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop "
    "mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors "
    "teddy_bear hair_drier toothbrush "
)
INSTANCES = {
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "images": [{"id": 42, "file_name": "COCO_val2014_42.jpg"}, {"id": 7, "file_name": "7.jpg"}],
    "annotations": [{"image_id": 42, "category_id": 18}] * 2 + [{"image_id": 42, "category_id": 1}],
}
SCENE = {"background": "pink", "layout": "row", "groups": [{"thing": "cat"}, {"thing": "owl"}]}


@pytest.fixture(scope="module")
def coco():
    return read_synonyms(COCO_OBJECTS)


def test_shipped_list_has_the_80_objects_of_coco(coco):
    assert sorted(coco.names) == sorted(name.replace("_", " ") for name in COCO.split())
    phrases = ("Sofa", "hot dogs", "dog house", "unicorn")
    assert [coco.name_of(text) for text in phrases] == ["couch", "hot dog", None, None]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two men walk their dogs.", ["person", "dog"]),
        ("A puppy and three kittens", ["dog", "cat"]),
        ("A hot dog on a plate", ["hot dog"]),
        ("A dog eats two hot-dogs", ["dog", "hot dog"]),
        ("A teddy bear beside a bear", ["teddy bear", "bear"]),
        ("A roll of toilet paper", []),
        ("A toilet with toilet paper", ["toilet"]),
        ("The dog house is empty", []),
        ("the woman's handbag", ["person", "handbag"]),
        ("the children\u2019s mice", ["person", "mouse"]),
        ("knives, forks, wine glasses and glasses of wine", ["knife", "fork", "wine glass", "wine glass"]),
        ("A baseball player swings a bat at the ball", ["person", "baseball bat", "sports ball"]),
        ("A man with a baseball cap on a tennis court", ["person"]),
        ("people on skis", ["person", "skis"]),
        ("a pair of scissors", ["scissors"]),
        ("TV remotes and a cell-phone", ["remote", "cell phone"]),
        ("A fire truck passes a truck stop", ["truck"]),
        ("They carry surfing gear to the carpet", []),
        ("geese and sheep, buses and benches", ["bird", "sheep", "bus", "bench"]),
        ("A dog. The dog, a puppy, barks.", ["dog", "dog", "dog"]),
        ("", []),
    ],
)
def test_mentions_in_the_words_of_coco(coco, text, objects):
    assert coco.mentions(text) == objects


def test_every_mini_thing_is_found_alone_and_in_plural():
    names = read_synonyms(MINI_OBJECTS)
    assert names.names == [thing.name for thing in THINGS]
    for thing in THINGS:
        assert names.mentions(f"A picture of two {thing.plural} and a {thing.name}.") == [thing.name] * 2


def test_own_list_has_colons_comments_words_that_name_nothing_and_plurals_of_its_own(tmp_path):
    assert ObjectNames({"ski pole": [], "skis": ["ski"]}).mentions("ski poles, skis") == ["ski pole", "skis"]
    (tmp_path / "words.txt").write_text("# animals\ndog: puppy, hound  # and more\ncat,kitten\n\n- dog house\n")
    names = read_synonyms(tmp_path / "words.txt")
    assert names.names == ["dog", "cat"]
    assert names.mentions("A kitten and hounds sit in the dog house") == ["cat", "dog"]


# What images show


@pytest.fixture
def read(tmp_path):
    """`read(truth, synonyms)`: the truth of files with that content; None: no such file."""

    def read(content, synonyms=None):
        if content is not None:
            (tmp_path / "truth.json").write_text(content if isinstance(content, str) else json.dumps(content))
        if synonyms is not None:
            (tmp_path / "words.txt").write_text(synonyms)
        return read_truth(tmp_path / "truth.json", tmp_path / "words.txt" if synonyms else None)

    return read


@pytest.mark.parametrize(
    ("content", "synonyms", "objects", "files"),
    [
        ({"42": ["puppy", "Dog", "man"], "7": []}, None, {"42": {"dog", "person"}, "7": set()}, {}),
        ({"42": {"objects": ["dog"], "file": "42.png"}}, None, {"42": {"dog"}}, {"42": "42.png"}),
        (INSTANCES, None, {"42": {"dog", "person"}, "7": set()}, {"42": "COCO_val2014_42.jpg", "7": "7.jpg"}),
        ({"1000840": SCENE}, None, {"1000840": {"cat", "owl"}}, {}),
        ({"1": ["unicorn"]}, "unicorn: horned horse\n", {"1": {"unicorn"}}, {}),
    ],
    ids=["lists", "with files", "COCO", "mini", "own synonyms"],
)
def test_truth_is_read_from_every_form(read, content, synonyms, objects, files):
    truth = read(content, synonyms)
    assert (truth.objects, truth.files) == (objects, files)


def test_captions_by_people_add_their_objects_to_all_images(read):
    truth = read({"42": ["dog"], "7": ["cat"]})
    more = truth.with_captions({"42": ["A man", "a dog"], "7": ["Nothing"]})
    assert more.objects == {"42": {"dog", "person"}, "7": {"cat"}}
    with pytest.raises(SampleError, match="1 of 2 images have no captions: '7'"):
        truth.with_captions({"42": ["A man"]})


@pytest.mark.parametrize(
    ("synonyms", "words"),
    [
        ("dog: hound\ncat: hound\n", "'hound' is in two lines, of 'dog' and 'cat'"),
        ("dog: hound\ndog: puppy\n", "line 2: the object 'dog'"),
        ("# nothing\n", "names no object"),
        ("dog: ...\n", "'...' of 'dog'"),
    ],
)
def test_bad_list_is_named(read, tmp_path, synonyms, words):
    with pytest.raises(ConfigError, match=rf"words\.txt.*{words}"):
        read({"42": ["dog"]}, synonyms)
    with pytest.raises(ConfigError, match=r"none\.txt: cannot be read"):
        read_synonyms(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ({"42": ["dog", "unicorn"]}, "1 of its objects .*'unicorn'; give --synonyms"),
        ({"42": "dog"}, "image 42: expected a list of names"),
        ([1], "expected"),
        ({}, "holds no image"),
        ({**INSTANCES, "annotations": [{"image_id": 42, "caption": "A dog"}]}, "lacks 'category_id'"),
        ({"1": {"groups": [{"count": 2}]}}, "lacks 'thing'"),
    ],
    ids=str,
)
def test_bad_truth_is_named(read, content, words):
    with pytest.raises((ConfigError, SampleError), match=rf"truth\.json.*{words}"):
        read(content)
