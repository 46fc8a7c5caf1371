"""Measurements of the failure rate: the published table, whole files, the same bytes however they are made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt4.common.config import Config
from minigpt4.evaluation.bootstrap import wilson
from minigpt4.evaluation.failure_rules import find_failures
from minigpt4.models.mini_gpt4 import MiniGPT4

REPOSITORY = Path(__file__).parents[2]
FILES = ("failures.json", "failures.md", "answers.json")
FORMS = {"detail": "prose", "poem": "verse"}
IMAGES = 11
LIMIT = 12


@pytest.fixture(scope="module")
def measurement(shared, command):
    """The shipped configuration with tiny weights, two checkpoints and eleven images."""
    folder = shared.folder
    checkpoints = [f"before stage 2={folder}/start.pth", f"after stage 2={folder}/checkpoint_1.pth"]
    given = {"checkpoints": checkpoints, "more": ("--images", f"{folder}/images")}
    measurement = replace(shared, config=folder / "failure.yaml", script=command("eval_failure_rate"), **given)
    measurement.take(REPOSITORY / "eval_configs" / "minigpt4_failure_eval.yaml")
    return measurement


@pytest.fixture(scope="module")
def complete(measurement) -> Path:
    """The results of both checkpoints by one process."""
    return measurement.run("failures")


def _facts(folder: Path) -> dict:
    return json.loads((folder / "failures.json").read_text())


def _answers(folder: Path) -> list[dict]:
    return json.loads((folder / "answers.json").read_text())


def _content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


# The table


def test_rates_count_the_answers_in_which_the_rules_find_something_to_every_image(complete, measurement):
    names = sorted(file.name for file in (measurement.folder / "images").iterdir())
    for one in _facts(complete)["checkpoints"]:
        for task, rate in one["tasks"].items():
            own = [a for a in _answers(complete) if (a["checkpoint"], a["task"]) == (one["name"], task)]
            assert [answer["image_id"] for answer in own] == names
            failed = sum(bool(find_failures(a["text"], FORMS[task], a["ended"])) for a in own)
            assert (rate["failed"], rate["images"], rate["rate"]) == (failed, IMAGES, failed / IMAGES)
            assert rate["interval"] == [*wilson(failed, IMAGES)]


def test_failures_are_listed_by_kind_with_text_and_evidence(complete):
    facts, markdown = _facts(complete), (complete / "failures.md").read_text()
    assert facts["failures"]
    for failure in facts["failures"]:
        for kind, evidence in failure["kinds"].items():
            assert f"\n## {kind}: " in markdown
            line = f"**{failure['checkpoint']}**, {failure['task']}, {failure['image_id']}: {evidence}"
            assert failure["text"].splitlines()[0] in markdown.split(line)[1]


def test_console_shows_the_published_table(complete, measurement, capsys):
    measurement.run(complete.name)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Failure rate, 11 images"
    assert lines[2:4] == ["| checkpoint | detailed description | poem |", "| --- | --- | --- |"]
    for line, one in zip(lines[4:6], _facts(complete)["checkpoints"], strict=True):
        cells = [f"{rate['rate']:.1%} ({rate['interval'][0]:.1%} - " for rate in one["tasks"].values()]
        assert line.startswith(f"| {one['name']} | {cells[0]}")
        assert f"| {cells[1]}" in line


def test_answers_are_those_of_generate_and_say_whether_they_ended(complete, alone):
    prompt = "###Human: <Img><ImageHere></Img> Write a poem about this image. ###Assistant: "
    wanted = {"checkpoint": "after stage 2", "task": "poem", "image_id": "104.jpg"}
    (found,) = [one for one in _answers(complete) if one.items() >= wanted.items()]
    assert found["text"] == alone("104.jpg", prompt, LIMIT)
    assert found["instruction"] == "Write a poem about this image."
    assert found["ended"] == (alone("104.jpg", prompt, LIMIT + 1) == found["text"])


def test_chosen_task_and_number_of_images_drawn_by_the_seed(measurement, monkeypatch):
    few = ("--tasks", "poem", "--limit", "4")
    folder = measurement.run("few", *few)
    facts, drawn = _facts(folder), {answer["image_id"] for answer in _answers(folder)}
    assert (facts["images"], list(facts["tasks"])) == (4, ["poem"])
    measurement.run("few", *few, "--options", "run.seed=7")
    assert {answer["image_id"] for answer in _answers(folder)} != drawn
    monkeypatch.setattr(MiniGPT4, "from_config", None)  # the same images are drawn, whose answers are there
    measurement.run("few", *few)
    assert {answer["image_id"] for answer in _answers(folder)} == drawn


def test_two_processes_leave_the_same_bytes_as_one(complete, measurement, warm):
    run = measurement.start(warm, "two_failures", processes=2)
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert _content(measurement.folder / "two_failures") == _content(complete)


# A judge


@pytest.fixture
def copied(complete, measurement, monkeypatch) -> str:
    """Name of a folder with all answers, where a model would be a waste."""
    shutil.rmtree(measurement.folder / "copied", ignore_errors=True)
    shutil.copytree(complete, measurement.folder / "copied")
    monkeypatch.setattr(MiniGPT4, "from_config", None)
    return "copied"


def _judge(chat_server, tmp_path: Path) -> list[str]:
    return ["--judge-url", chat_server.url, "--judge-model", "tiny", "--judge-cache", str(tmp_path / "cache.jsonl")]


def test_judge_sees_image_instruction_and_answer_and_adds_two_kinds(chat_server, measurement, copied, tmp_path):
    chat_server.answer = lambda request: (
        "IMAGE: no - there is no such thing\nINSTRUCTION: "
        + ("no - prose" if "Write a poem" in request["messages"][-1]["content"][0]["text"] else "yes - fine")
    )
    facts = _facts(measurement.run(copied, *_judge(chat_server, tmp_path)))
    for one in facts["checkpoints"]:
        asked = {task: IMAGES - rate["kinds"].get("empty", 0) for task, rate in one["tasks"].items()}
        assert one["tasks"]["detail"]["kinds"]["off the image"] == asked["detail"]
        assert "off the instruction" not in one["tasks"]["detail"]["kinds"]
        assert one["tasks"]["poem"]["kinds"]["off the instruction"] == asked["poem"]
        assert [rate["failed"] for rate in one["tasks"].values()] == [IMAGES] * 2
    assert facts["failures"][0]["kinds"]["off the image"] == "the judge: there is no such thing"
    text, image = chat_server.requests[0]["messages"][-1]["content"]
    assert "Describe this image in detail." in text["text"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_judge_that_rambles_finds_nothing_and_is_counted(chat_server, complete, measurement, copied, tmp_path):
    chat_server.answer = lambda request: "What a lovely picture!"
    facts = _facts(measurement.run(copied, *_judge(chat_server, tmp_path)))
    empty = [rate["kinds"].get("empty", 0) for one in facts["checkpoints"] for rate in one["tasks"].values()]
    assert facts["judge"]["unread_replies"] == len(_answers(complete)) - sum(empty) == len(chat_server.requests)
    assert [one["tasks"] for one in facts["checkpoints"]] == [one["tasks"] for one in _facts(complete)["checkpoints"]]
    assert any("could not be read" in note for note in facts["notes"])


# Images and errors


def test_prompt_without_an_image_is_named(measurement, capsys):
    assert measurement.script.main(measurement.arguments("errors", "--options", "run.failure_prompts.poem=Sing.")) == 2
    assert "run.failure_prompts.poem: 'Sing.' must hold" in capsys.readouterr().err


def test_mini_configuration_asks_the_mini_model(measurement):
    arguments = ["--cfg-path", str(REPOSITORY / "eval_configs" / "mini_failure_eval.yaml")]
    config = Config(measurement.script.parse_args([*arguments, *measurement.arguments("unused")[2:]]))
    config.validate(training=False)
    assert config.model.end_sym == "<|im_end|>"
    assert config.run.failure_prompts.poem == "<ImageHere> Write a poem about the picture."
