"""CHAIR by hand and on mini scenes, whose truth is known exactly; questions about objects, and bad files of them."""

import json
from dataclasses import asdict

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.evaluation.bootstrap import wilson
from minigpt4.evaluation.hallucination import (
    ObjectNames,
    ObjectQuestion,
    Truth,
    chair,
    make_questions,
    pope_scores,
    question_text,
    read_answers,
    read_object_questions,
    read_truth,
    write_lines,
)
from minigpt4.mini.report import measure
from minigpt4.mini.scenes import THINGS, alt_text, five_captions, sample_scenes

SCENES = {str(1000 + number): scene for number, scene in enumerate(sample_scenes("test", 60, seed=3))}
RECORDS = {image_id: scene.record() for image_id, scene in SCENES.items()}
GROUPS = sum(len(scene.groups) for scene in SCENES.values())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Truth:
    path = tmp_path_factory.mktemp("mini") / "scenes_test.json"
    path.write_text(json.dumps(RECORDS))
    return read_truth(path)


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
    assert found["scores"]["recall"] == 1
    assert [entry["image_id"] for entry in found["wrong"]] == altered
    low, high = found["intervals"]["CHAIR-i"]
    assert low < found["scores"]["CHAIR-i"] < high


def test_captions_of_other_scenes_are_judged_as_the_mini_measures_do(scenes):
    ids = list(SCENES)
    captions = {image_id: alt_text(SCENES[other]) for image_id, other in zip(ids, ids[1:] + ids[:1], strict=True)}
    scores, measured = chair(captions, scenes)["scores"], measure(captions, RECORDS)
    assert scores["CHAIR-i (once)"] == pytest.approx(measured.things_wrong)
    assert scores["recall"] == pytest.approx(measured.things_named)
    assert scores["CHAIR-i"] > 0.8


# Questions


NAMES = ObjectNames({name: [] for name in ("dog", "cat", "cup", "fork", "owl")})
OBJECTS = (("dog", "cat"), ("cup", "fork"), ("cup", "fork"), ("cat",), ("cat", "cup"), ())
TRUTH = Truth({str(number): frozenset(own) for number, own in enumerate(OBJECTS, start=1)}, NAMES)


@pytest.mark.parametrize(
    ("negatives", "image", "asked"),
    [
        ("popular", "1.jpg", ["cup", "fork"]),  # cat and cup in three images, fork in two, dog in one
        ("popular", "2.jpg", ["cat", "dog"]),
        ("adversarial", "2.jpg", ["cat", "dog"]),  # cat was once with a cup
        ("adversarial", "4.jpg", ["cup"]),  # dog and cup once each; cup is more frequent
        ("adversarial", "5.jpg", ["fork", "dog"]),  # fork twice with a cup
    ],
)
def test_absent_objects_are_the_frequent_ones_or_those_that_go_with_what_is_there(negatives, image, asked):
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


def test_questions_and_answers_are_read_in_the_published_forms(tmp_path):
    questions = make_questions(TRUTH, "random")
    write_lines(tmp_path / "deep" / "questions.json", map(asdict, questions))
    assert read_object_questions(tmp_path / "deep" / "questions.json") == questions
    line = '{"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a car in the image?", "label": "yes"}'
    (tmp_path / "coco_pope_random.json").write_text(line + "\n\n" + line.replace(": 1,", ": 2,"))
    wanted = [ObjectQuestion(n, "COCO_val2014_1.jpg", "Is there a car in the image?", "yes") for n in (1, 2)]
    assert read_object_questions(tmp_path / "coco_pope_random.json") == wanted
    lines = '{"question_id": "a", "answer": "yes"}\n{"question_id": 2, "text": "no", "prompt": "?"}\n'
    (tmp_path / "answers.jsonl").write_text(lines)
    assert read_answers(tmp_path / "answers.jsonl") == {"a": "yes", "2": "no"}


TWICE = '{"question_id": 1, "answer": ""}\n{"question_id": 1, "answer": ""}'


@pytest.mark.parametrize(
    ("read", "lines", "words"),
    [
        (read_object_questions, '{"question_id": 1, "image": "1.jpg", "text": "?"}', "line 1: the field 'label'"),
        (
            read_object_questions,
            '\n{"question_id": 1, "image": "1", "text": "?", "label": "maybe"}',
            "question 1.*'maybe'",
        ),
        (read_object_questions, "[1]", "line 1: not an object"),
        (read_object_questions, "{", "line 1: not JSON"),
        (read_object_questions, "", "holds no questions"),
        (read_answers, '{"question_id": 1}', "line 1: the field 'answer'"),
        (read_answers, TWICE, "line 2: the question_id 1 comes twice"),
    ],
)
def test_bad_line_is_named(tmp_path, read, lines, words):
    (tmp_path / "file.jsonl").write_text(lines)
    with pytest.raises(SampleError, match=rf"file\.jsonl.*{words}"):
        read(tmp_path / "file.jsonl")
