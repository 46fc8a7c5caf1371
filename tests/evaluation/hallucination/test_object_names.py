"""Objects that texts name: synonyms, plurals, double words, and the shipped lists."""

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.evaluation.hallucination import COCO_OBJECTS, MINI_OBJECTS, ObjectNames, read_synonyms
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


@pytest.fixture(scope="module")
def coco():
    return read_synonyms(COCO_OBJECTS)


def test_shipped_list_has_the_80_objects_of_coco(coco):
    assert sorted(coco.names) == sorted(name.replace("_", " ") for name in COCO.split())


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
        ("", []),
    ],
)
def test_mentions_in_the_words_of_coco(coco, text, objects):
    assert coco.mentions(text) == objects


def test_every_mention_counts(coco):
    assert coco.mentions("A dog. The dog, a puppy, barks.") == ["dog", "dog", "dog"]


def test_every_mini_thing_is_found_alone_and_in_plural():
    names = read_synonyms(MINI_OBJECTS)
    assert names.names == [thing.name for thing in THINGS]
    for thing in THINGS:
        assert names.mentions(f"A picture of two {thing.plural} and a {thing.name}.") == [thing.name] * 2


def test_name_of_takes_synonyms_of_the_whole_phrase(coco):
    assert [coco.name_of(text) for text in ("Sofa", "hot dogs", "dog house", "unicorn")] == [
        "couch",
        "hot dog",
        None,
        None,
    ]


def test_file_with_colons_comments_and_words_that_name_nothing(tmp_path):
    (tmp_path / "words.txt").write_text("# animals\ndog: puppy, hound  # and more\ncat,kitten\n\n- dog house\n")
    names = read_synonyms(tmp_path / "words.txt")
    assert names.names == ["dog", "cat"]
    assert names.mentions("A kitten and hounds sit in the dog house") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dog: hound\ncat: hound\n", "'hound' is in two lines, of 'dog' and 'cat'"),
        ("dog: hound\ndog: puppy\n", "line 2: the object 'dog' has a line already"),
        ("# nothing\n", "names no object"),
        ("dog: ...\n", "'...' of 'dog' has no words"),
    ],
)
def test_bad_file_is_named(tmp_path, text, words):
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(ConfigError, match=rf"words\.txt.*{words}"):
        read_synonyms(tmp_path / "words.txt")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"words\.txt: cannot be read"):
        read_synonyms(tmp_path / "words.txt")


def test_own_plural_goes_before_a_made_one():
    assert ObjectNames({"ski pole": [], "skis": ["ski"]}).mentions("ski poles, skis") == ["ski pole", "skis"]
