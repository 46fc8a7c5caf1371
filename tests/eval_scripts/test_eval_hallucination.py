"""CHAIR and questions about objects as commands: on files, and with a model of tiny weights."""

import json
from dataclasses import replace

import pytest

from minigpt4.mini.scenes import sample_scenes
from minigpt4.models.mini_gpt4 import MiniGPT4

SCENES = {str(1000 + number): scene for number, scene in enumerate(sample_scenes("test", 30, seed=5))}
PROMPT = "<Img><ImageHere></Img> {} Yes or no?"
OBJECTS = (["dog", "cat"], ["bus", "person"], ["cup", "fork", "knife"], ["bird"])


@pytest.fixture
def main(command):
    return command("eval_hallucination").main


@pytest.fixture
def truth(tmp_path):
    path = tmp_path / "scenes_test.json"
    path.write_text(json.dumps({image_id: scene.record() for image_id, scene in SCENES.items()}))
    return str(path)


@pytest.fixture(scope="module")
def questions(shared, command):
    """Questions about the images of the tiny evaluation; two questions or more an image."""
    truth, file = shared.folder / "truth.json", shared.folder / "questions.jsonl"
    truth.write_text(json.dumps({f"10{number}": OBJECTS[number % 4] for number in range(11)}))
    assert command("eval_hallucination").main(["pope-questions", str(truth), "--output", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def arguments(shared, questions):
    """`arguments(name, *more)`: the command that asks the tiny checkpoints; `name` is that of the results' folder."""
    asking = ("--questions", str(questions), "--image-path", str(shared.folder / "images"), "--prompt", PROMPT)
    return lambda name, *more: ["pope", *replace(shared, more=asking).arguments(name, *more)]


@pytest.fixture(scope="module")
def asked(shared, arguments, command):
    """The folder of a whole run."""
    assert command("eval_hallucination").main(arguments("pope")) == 0
    return shared.folder / "pope"


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# CHAIR


def test_wrong_objects_are_listed_unless_people_named_them(main, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps([{"image_id": 1, "caption": "A puppy and a hot dog"}]))
    (tmp_path / "truth.json").write_text(json.dumps({"1": ["dog"]}))
    (tmp_path / "captions.json").write_text(json.dumps([{"image_id": 1, "captions": ["A dog eats hot dogs"]}]))
    output = tmp_path / "chair.json"
    files = [str(tmp_path / "results.json"), str(tmp_path / "truth.json"), "--output", str(output)]
    assert main(["chair", *files]) == 0
    assert "1 captions, 1 with an object that is not there" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["scores"]["CHAIR-i"] == 0.5
    assert [(one["wrong"], one["shown"]) for one in found["wrong"]] == [(["hot dog"], ["dog"])]
    assert main(["chair", *files, "--captions", str(tmp_path / "captions.json")]) == 0
    assert json.loads(output.read_text())["scores"]["CHAIR-i"] == 0
    (tmp_path / "captions.json").write_text(json.dumps([{"image_id": 2, "captions": ["A dog"]}]))
    assert main(["chair", *files, "--captions", str(tmp_path / "captions.json")]) == 2
    assert "1 of 1 images have no captions: '1'" in capsys.readouterr().err


# Questions


@pytest.mark.parametrize("negatives", ["random", "popular", "adversarial"])
def test_a_model_that_knows_the_mini_scenes_answers_all_questions(main, truth, tmp_path, negatives, capsys):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    assert main(["pope-questions", truth, "--negatives", negatives, "--output", str(questions)]) == 0
    things = {image_id: {group.thing.name for group in scene.groups} for image_id, scene in SCENES.items()}
    asked = _lines(questions)
    assert len(asked) == 2 * sum(map(len, things.values()))
    with answers.open("w") as file:
        for line in asked:
            there = any(f" {name} in the" in line["text"] for name in things[line["image"].removesuffix(".jpg")])
            file.write(json.dumps({"question_id": line["question_id"], "answer": "Yes." if there else "No."}) + "\n")
    assert main(["pope-score", str(answers), str(questions), "--output", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores == {"accuracy": 1, "precision": 1, "recall": 1, "yes share": 0.5, "F1": 1}
    assert "0 answers are neither yes nor no" in capsys.readouterr().out


# A model is asked


def test_every_checkpoint_answers_every_question(asked, questions, alone):
    wanted = _lines(questions)
    said = [_lines(asked / f"answers_{name}.jsonl") for name in ("pretrained", "epoch_0", "epoch_1")]
    for answers in said:
        keys = [(one["question_id"], one["question"]) for one in answers]
        assert keys == [(one["question_id"], one["text"]) for one in wanted]
    assert said[0] != said[1] != said[2]
    facts = json.loads((asked / "pope.json").read_text())
    assert [row["name"] for row in facts["checkpoints"]] == ["pretrained", "epoch 0", "epoch 1"]
    assert (facts["images"], facts["checkpoints"][0]["questions"]) == (11, len(wanted))
    assert "{}" in facts["setup"]["prompt"]
    for line in said[2][4:6]:
        assert line["answer"] == alone(line["image"], f"###Human: {PROMPT.format(line['question'])} ###Assistant: ")


def test_written_answers_score_the_same_without_a_model(main, asked, questions, tmp_path):
    output = tmp_path / "scores.json"
    assert main(["pope-score", str(asked / "answers_epoch_0.jsonl"), str(questions), "--output", str(output)]) == 0
    (row,) = [row for row in json.loads((asked / "pope.json").read_text())["checkpoints"] if row["name"] == "epoch 0"]
    scored = json.loads(output.read_text())
    assert (scored["scores"], scored["unparsable"]) == (row["scores"], row["unparsable"])


def test_second_run_generates_nothing_and_an_image_is_encoded_once(asked, arguments, main, monkeypatch):
    encoded, encode = [], MiniGPT4.image_features
    monkeypatch.setattr(
        MiniGPT4, "image_features", lambda self, image: encoded.append(len(image)) or encode(self, image)
    )
    before = (asked / "pope.json").read_bytes()
    assert main(arguments("pope")) == 0
    assert ((asked / "pope.json").read_bytes(), encoded) == (before, [])
    assert main(arguments("counted", "--options", "run.batch_size_eval=100")) == 0
    assert encoded == [11]


def test_what_is_wrong_is_named(main, arguments, truth, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps([{"image_id": "1000", "caption": "A cat"}]))
    chair = ["chair", str(tmp_path / "results.json"), truth]
    assert main([*chair, "--partial"]) == 0
    for given, text in (
        (chair, "--partial"),
        ([*arguments("missing"), "--image-path", str(tmp_path)], "11 of 11 images are not in"),
        ([*arguments("prompts"), "--prompt", "<Img><ImageHere></Img> Is it?"], "--prompt"),
        ([*arguments("prompts"), "--prompt", "{} without an image"], "--prompt"),
    ):
        assert main(given) == 2
        assert text in capsys.readouterr().err
