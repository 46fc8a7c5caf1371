"""Objects in texts and in images, in every form; CHAIR by hand and on mini scenes; questions about objects."""

import json

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.evaluation.bootstrap import wilson
from minigpt4.evaluation.hallucination import (
    COCO_OBJECTS,
    ObjectNames,
    ObjectQuestion,
    Truth,
    chair,
    make_questions,
    mini_objects,
    pope_scores,
    question_text,
    read_object_questions,
    read_synonyms,
    read_truth,
)
from minigpt4.mini.report import measure
from minigpt4.mini.scenes import THINGS, alt_text, five_captions, sample_scenes

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
SCENES = {str(1000 + number): scene for number, scene in enumerate(sample_scenes("test", 60, seed=3))}
RECORDS = {image_id: scene.record() for image_id, scene in SCENES.items()}
GROUPS = sum(len(scene.groups) for scene in SCENES.values())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Truth:
    path = tmp_path_factory.mktemp("mini") / "scenes_test.json"
    path.write_text(json.dumps(RECORDS))
    return read_truth(path)


# Objects that texts name


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
    names = mini_objects()
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


def test_images_may_be_called_after_their_files():
    objects = {"42": frozenset(["dog"]), "7": frozenset(["cat"])}
    truth = Truth(objects, ObjectNames({"dog": [], "cat": []}), {"42": "COCO_42.jpg", "7": "COCO_7.jpg"})
    assert truth.called(["7", "COCO_42"]) == truth
    called = truth.called(["COCO_42"])
    assert called.objects == {"COCO_42": objects["42"], "COCO_7": objects["7"]}
    assert called.files == {"COCO_42": "COCO_42.jpg", "COCO_7": "COCO_7.jpg"}


@pytest.mark.parametrize(
    ("synonyms", "words"),
    [
        ("dog: hound\ncat: hound\n", "'hound' is a name of both 'dog' and 'cat'"),
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
        ({"42": ["dog", "unicorn"]}, "1 of its objects .*'unicorn'; .*--synonyms"),
        ({"42": "dog"}, r"42\.objects: Input should be a valid list"),
        ([1], "Input should be a valid dictionary"),
        ({}, "holds no image"),
        ({**INSTANCES, "annotations": [{"image_id": 42, "caption": "A dog"}]}, "category_id: Field required"),
        ({"1": {"groups": [{"count": 2}]}}, "thing: Field required"),
    ],
    ids=str,
)
def test_bad_truth_is_named(read, content, words):
    with pytest.raises((ConfigError, SampleError), match=rf"truth\.json.*{words}"):
        read(content)


# CHAIR


def test_chair_by_hand():
    names = ObjectNames({"dog": ["puppy"], "cat": [], "cup": [], "table": []})
    truth = Truth({"1": frozenset({"dog", "cup"}), "2": frozenset({"cat"}), "3": frozenset({"table"})}, names)
    captions = {
        "1": "A dog, a puppy and a cat look at the cat.",  # dog dog cat cat: 2 of 4 wrong; once: 1 of 2; 1 of 2 found
        "2": "A cat sleeps.",  # 1 right; 1 of 1 found
        "3": "Nothing to see here.",  # 0 of 1 found
    }
    found = chair(captions, truth)
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
    counts = {"captions": 3, "captions_wrong": 1, "mentions": 5, "mentions_wrong": 2}
    assert found["counts"] == counts | {"objects_named": 3, "objects_right": 2, "objects_shown": 4}
    wrong = {"image_id": "1", "caption": captions["1"], "wrong": ["cat"], "shown": ["cup", "dog"]}
    assert found["wrong"] == [wrong]
    nothing = chair({"3": ""}, truth)
    assert [nothing["scores"][name] for name in ("CHAIR-i", "CHAIR-s", "recall")] == [None, 0.0, 0.0]
    assert "CHAIR-i" not in nothing["intervals"]


def test_true_captions_of_every_style_have_no_wrong_objects(scenes):
    for style in range(5):
        scores = chair({key: five_captions(scene)[style] for key, scene in SCENES.items()}, scenes)["scores"]
        assert (scores["CHAIR-i"], scores["CHAIR-s"], scores["recall"], scores["F1"]) == (0, 0, 1, 1)


def test_a_false_thing_in_every_third_caption_is_found_exactly(scenes):
    captions = {image_id: alt_text(scene) for image_id, scene in SCENES.items()}
    altered = list(SCENES)[::3]
    for image_id in altered:
        shown = {group.thing for group in SCENES[image_id].groups}
        captions[image_id] += f" with a {next(thing.name for thing in THINGS if thing not in shown)}"
    found = chair(captions, scenes)
    assert found["scores"]["CHAIR-s"] == len(altered) / len(SCENES) == 1 / 3
    assert found["scores"]["CHAIR-i"] == len(altered) / (GROUPS + len(altered))
    assert found["scores"]["CHAIR-i (once)"] == pytest.approx(measure(captions, RECORDS).things_wrong)
    assert found["scores"]["recall"] == measure(captions, RECORDS).things_named == 1
    assert [entry["image_id"] for entry in found["wrong"]] == altered
    low, high = found["intervals"]["CHAIR-i"]
    assert low < found["scores"]["CHAIR-i"] < high


# Questions


NAMES = ObjectNames({name: [] for name in ("dog", "cat", "cup", "fork", "owl")})
OBJECTS = (("dog", "cat"), ("cup", "fork"), ("cup", "fork"), ("cat",), ("cat", "cup"), ())
TRUTH = Truth({str(number): frozenset(own) for number, own in enumerate(OBJECTS, start=1)}, NAMES)


def test_absent_objects_are_the_frequent_ones_or_those_that_go_with_what_is_there():
    for negatives, image, asked in (
        ("popular", "1.jpg", ["cup", "fork"]),  # cat and cup in three images, fork in two, dog in one
        ("popular", "2.jpg", ["cat", "dog"]),
        ("adversarial", "2.jpg", ["cat", "dog"]),  # cat was once with a cup
        ("adversarial", "4.jpg", ["cup"]),  # dog and cup once each; cup is more frequent
        ("adversarial", "5.jpg", ["fork", "dog"]),  # fork twice with a cup
    ):
        own = [q.text for q in make_questions(TRUTH, negatives, pairs=2) if (q.image, q.label) == (image, "no")]
        assert own == [question_text(name) for name in asked]
    assert question_text("apple") == "Is there an apple in the image?"
    assert question_text("skis") == "Are there any skis in the image?"


def test_what_is_drawn_depends_on_the_seed_alone():
    drawn = [make_questions(TRUTH, "random", pairs=2, images=2, seed=seed) for seed in range(8)]
    assert make_questions(TRUTH, "random", pairs=2, images=2, seed=1) == drawn[1]
    assert len({json.dumps([question.text for question in own]) for own in drawn}) > 1
    chosen = {tuple(sorted({q.image for q in own})) for own in drawn}
    assert len(chosen) > 1
    assert {len(images) for images in chosen} == {2}


def test_images_with_few_objects_are_left_out_and_files_are_named_by_the_truth_or_by_the_suffix():
    assert {q.image for q in make_questions(TRUTH, "random", least_objects=2)} == {"1.jpg", "2.jpg", "3.jpg", "5.jpg"}
    truth = Truth({"1": frozenset({"dog"}), "2": frozenset({"cat"})}, NAMES, {"1": "COCO_1.jpg"})
    assert {q.image for q in make_questions(truth, "random", suffix=".png")} == {"COCO_1.jpg", "2.png"}
    with pytest.raises(ConfigError, match="4 images have 2 objects or more, 9 are needed; see --least-objects"):
        make_questions(TRUTH, "random", least_objects=2, images=9)


def test_scores_by_hand():
    labels = ["yes", "yes", "yes", "yes", "no", "no", "no", "no"]
    questions = [ObjectQuestion(n, "1.jpg", "Is there a dog?", label) for n, label in enumerate(labels)]
    said = ["Yes.", "yes", "yes", "no", "Yes", "no", "no", "A dog?"]
    found = pope_scores(questions, {str(n): answer for n, answer in enumerate(said)})
    assert found["scores"] == {"accuracy": 5 / 8, "precision": 3 / 4, "recall": 3 / 4, "yes share": 4 / 8, "F1": 3 / 4}
    assert found["unparsable"] == ["7"]
    assert (found["intervals"]["accuracy"], found["intervals"]["recall"]) == (wilson(5, 8), wilson(3, 4))
    never = pope_scores(questions[:1], {"0": "no"})
    assert (never["scores"]["precision"], never["scores"]["F1"]) == (None, 0)
    assert "precision" not in never["intervals"]
    with pytest.raises(SampleError, match="7 questions have no answer: question_id 1, 2, 3, ..."):
        pope_scores(questions, {"0": "yes"})
    with pytest.raises(SampleError, match="1 answers have no question"):
        pope_scores([], {"0": "yes"})


def test_questions_are_read_in_the_published_form_and_a_bad_line_is_named(tmp_path):
    file = tmp_path / "coco_pope_random.json"
    line = '{"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a car in the image?", "label": "yes"}'
    file.write_text(line + "\n\n" + line.replace(": 1,", ": 2,"))
    wanted = [ObjectQuestion(n, "COCO_val2014_1.jpg", "Is there a car in the image?", "yes") for n in (1, 2)]
    assert read_object_questions(file) == wanted
    for lines, words in (
        (line.replace("label", "labels"), "line 1, label: Field required"),
        (line.replace('"yes"', '"maybe"'), "question 1.*'maybe'"),
        ("[1]", "line 1: not an object"),
        ("{", "line 1: not JSON"),
        ("", "holds no questions"),
    ):
        file.write_text(lines)
        with pytest.raises(SampleError, match=rf"coco_pope_random\.json.*{words}"):
            read_object_questions(file)
