"""Questions about objects: who is asked about, how answers are scored, and bad files."""

import json
from dataclasses import asdict

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.evaluation.bootstrap import wilson
from minigpt4.evaluation.hallucination import (
    ObjectNames,
    ObjectQuestion,
    Truth,
    make_questions,
    pope_scores,
    question_text,
    read_answers,
    read_questions,
    write_lines,
)

NAMES = ObjectNames({name: [] for name in ("dog", "cat", "cup", "fork", "owl")})
TRUTH = Truth(
    {
        "1": frozenset({"dog", "cat"}),
        "2": frozenset({"cup", "fork"}),
        "3": frozenset({"cup", "fork"}),
        "4": frozenset({"cat"}),
        "5": frozenset({"cat", "cup"}),
        "6": frozenset(),
    },
    NAMES,
)


def _asked(questions, image, label):
    return [q.text.split(" a ")[-1].split(" in ")[0] for q in questions if (q.image, q.label) == (image, label)]


@pytest.mark.parametrize("negatives", ["random", "popular", "adversarial"])
def test_questions_are_true_and_balanced(negatives):
    questions = make_questions(TRUTH, negatives, pairs=2)
    assert [question.question_id for question in questions] == list(range(1, 19))
    assert sum(question.label == "yes" for question in questions) == 9
    for question in questions:
        (name,) = NAMES.mentions(question.text)
        assert (name in TRUTH.objects[question.image.removesuffix(".jpg")]) == (question.label == "yes")


def test_popular_negatives_are_the_most_frequent_absent_objects():
    questions = make_questions(TRUTH, "popular", pairs=2)  # cat and cup in three images, fork in two, dog in one
    assert _asked(questions, "1.jpg", "no") == ["cup", "fork"]
    assert _asked(questions, "2.jpg", "no") == ["cat", "dog"]


def test_adversarial_negatives_are_those_that_go_with_what_is_there():
    questions = make_questions(TRUTH, "adversarial", pairs=2)
    assert _asked(questions, "2.jpg", "no") == ["cat", "dog"]  # cat was once with a cup
    assert _asked(questions, "4.jpg", "no") == ["cup"]  # dog and cup once each; cup is more frequent
    assert _asked(questions, "5.jpg", "no") == ["fork", "dog"]  # fork twice with a cup


def test_random_negatives_depend_on_the_seed_alone():
    def ask(seed):
        return make_questions(TRUTH, "random", pairs=2, seed=seed)

    assert ask(1) == ask(1)
    assert len({json.dumps([question.text for question in ask(seed)]) for seed in range(5)}) > 1


def test_images_with_few_objects_are_left_out():
    assert {q.image for q in make_questions(TRUTH, "random", least_objects=2)} == {"1.jpg", "2.jpg", "3.jpg", "5.jpg"}


def test_some_images_are_drawn_by_the_seed():
    chosen = {tuple({q.image for q in make_questions(TRUTH, "random", images=2, seed=seed)}) for seed in range(8)}
    assert all(len(images) == 2 for images in chosen)
    assert len(chosen) > 1


def test_files_are_named_by_the_truth_or_by_the_suffix():
    truth = Truth({"1": frozenset({"dog"}), "2": frozenset({"cat"})}, NAMES, {"1": "COCO_1.jpg"})
    assert {q.image for q in make_questions(truth, "random", suffix=".png")} == {"COCO_1.jpg", "2.png"}


def test_too_few_images_are_an_error_that_names_the_option():
    with pytest.raises(ConfigError, match="4 images have 2 objects or more, 9 are needed; see --least-objects"):
        make_questions(TRUTH, "random", least_objects=2, images=9)


def test_words_of_questions():
    assert question_text("dog") == "Is there a dog in the image?"
    assert question_text("apple") == "Is there an apple in the image?"
    assert question_text("skis") == "Are there any skis in the image?"


def test_scores_by_hand():
    labels = ["yes", "yes", "yes", "yes", "no", "no", "no", "no"]
    questions = [ObjectQuestion(n, "1.jpg", "Is there a dog?", label) for n, label in enumerate(labels)]
    said = ["Yes.", "yes", "yes", "no", "Yes", "no", "no", "A dog?"]
    found = pope_scores(questions, {str(n): answer for n, answer in enumerate(said)})
    assert found["scores"] == {"accuracy": 5 / 8, "precision": 3 / 4, "recall": 3 / 4, "yes share": 4 / 8, "F1": 3 / 4}
    assert found["unparsable"] == ["7"]
    assert found["intervals"]["accuracy"] == wilson(5, 8)
    assert found["intervals"]["recall"] == wilson(3, 4)


def test_a_model_that_never_says_yes_has_no_precision():
    questions = [ObjectQuestion(1, "1.jpg", "Is there a dog?", "yes")]
    found = pope_scores(questions, {"1": "no"})
    assert (found["scores"]["precision"], found["scores"]["F1"]) == (None, 0)
    assert "precision" not in found["intervals"]


def test_questions_come_back_from_their_file(tmp_path):
    questions = make_questions(TRUTH, "random")
    write_lines(tmp_path / "deep" / "questions.json", map(asdict, questions))
    assert read_questions(tmp_path / "deep" / "questions.json") == questions


def test_published_form_is_read(tmp_path):
    line = '{"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a car in the image?", "label": "yes"}'
    (tmp_path / "coco_pope_random.json").write_text(line + "\n\n" + line.replace(": 1,", ": 2,"))
    first, second = read_questions(tmp_path / "coco_pope_random.json")
    assert first == ObjectQuestion(1, "COCO_val2014_1.jpg", "Is there a car in the image?", "yes")
    assert second.question_id == 2


def test_answers_may_be_called_text(tmp_path):
    (tmp_path / "answers.jsonl").write_text(
        '{"question_id": "a", "answer": "yes"}\n{"question_id": 2, "text": "no", "prompt": "?"}\n'
    )
    assert read_answers(tmp_path / "answers.jsonl") == {"a": "yes", "2": "no"}


@pytest.mark.parametrize(
    ("read", "lines", "words"),
    [
        (read_questions, '{"question_id": 1, "image": "1.jpg", "text": "?"}', "line 1: the field 'label'"),
        (read_questions, '\n{"question_id": 1, "image": "1", "text": "?", "label": "maybe"}', "line 2.*'maybe'"),
        (read_questions, "[1]", "line 1: not an object"),
        (read_questions, "{", "line 1: not JSON"),
        (read_questions, "", "holds no questions"),
        (read_answers, '{"question_id": 1}', "line 1: an answer needs"),
        (
            read_answers,
            '{"question_id": 1, "answer": ""}\n{"question_id": 1, "answer": ""}',
            "line 2: the question 1 has",
        ),
    ],
)
def test_bad_line_is_named(tmp_path, read, lines, words):
    (tmp_path / "file.jsonl").write_text(lines)
    with pytest.raises(SampleError, match=rf"file\.jsonl.*{words}"):
        read(tmp_path / "file.jsonl")


def test_questions_and_answers_must_fit():
    questions = [ObjectQuestion(1, "1.jpg", "Is there a dog?", "yes"), ObjectQuestion(2, "1.jpg", "And a cat?", "no")]
    with pytest.raises(SampleError, match="1 questions have no answer: question_id 2"):
        pope_scores(questions, {"1": "yes"})
    with pytest.raises(SampleError, match="1 answers have no question: question_id 3"):
        pope_scores(questions, {"1": "yes", "2": "no", "3": "no"})
