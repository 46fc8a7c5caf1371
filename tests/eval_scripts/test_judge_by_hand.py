"""The page for people: a real server, used through its API."""

import json

import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError
from minigpt4.evaluation.failure_rate import (
    VERDICTS,
    AnnotationSession,
    AskedAnswer,
    read_answers,
    read_verdicts,
    write_answers,
)

TEXTS = {"before": ("A red thing. " * 9, "A thing."), "after": ("A red square on a wall.", "A green square.")}


@pytest.fixture
def answers(tmp_path) -> list[AskedAnswer]:
    """Two checkpoints on two images."""
    for colour in ("red", "green"):
        Image.new("RGB", (32, 24), colour).save(tmp_path / f"{colour}.png")
    return [
        AskedAnswer(name, "detail", colour, str(tmp_path / f"{colour}.png"), "Describe this.", text, True)
        for name, texts in TEXTS.items()
        for colour, text in zip(("red", "green"), texts, strict=True)
    ]


@pytest.fixture
def script(command):
    return command("judge_by_hand")


@pytest.fixture
def open_page(script, answers, tmp_path):
    """`open_page()`: a client of a page that has just started."""
    from gradio_client import Client

    pages = []

    def open_page():
        page = script.page(AnnotationSession(answers, tmp_path / VERDICTS, seed=0))
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
        pages.append(page)
        return Client(url, verbose=False)

    yield open_page
    for page in pages:
        page.close()


def _shown(outputs) -> tuple[str, str]:
    """Progress and answer."""
    return outputs[0], outputs[3]


def test_page_takes_a_verdict_a_click_and_shows_the_next_answer(open_page, answers, tmp_path):
    client = open_page()
    progress, first = _shown(client.predict(api_name="/start"))
    assert progress == "0 of 4 answers judged"
    progress, second = _shown(client.predict(api_name="/cut_off"))
    assert progress == "1 of 4 answers judged"
    assert first != second
    keys = {answer.text: answer.key for answer in answers}
    assert read_verdicts(tmp_path / VERDICTS) == {keys[first]: ["cut off"]}


def test_page_goes_on_where_it_was_left_and_ends(open_page, tmp_path):
    client = open_page()
    seen = [_shown(client.predict(api_name="/start"))[1]]
    seen.append(_shown(client.predict(api_name="/fine"))[1])
    client = open_page()
    assert _shown(client.predict(api_name="/start"))[1] == seen[1]
    seen += [_shown(client.predict(api_name=name))[1] for name in ("/fine", "/repetition")]
    assert sorted(seen) == sorted(text for texts in TEXTS.values() for text in texts)
    outputs = client.predict(api_name="/off_the_image")
    assert outputs[0] == "4 of 4 answers judged"
    assert "nothing is left" in outputs[2]
    client.predict(api_name="/fine")
    assert len((tmp_path / VERDICTS).read_text().splitlines()) == 4


def test_verdict_can_be_taken_back(open_page, answers, tmp_path):
    client = open_page()
    _, first = _shown(client.predict(api_name="/start"))
    client.predict(api_name="/empty")
    assert _shown(client.predict(api_name="/back"))[1] == first
    client.predict(api_name="/fine")
    assert list(read_verdicts(tmp_path / VERDICTS).values()) == [[]]


def test_page_shows_the_image_and_the_instruction_and_no_checkpoint(open_page):
    outputs = open_page().predict(api_name="/start")
    with Image.open(outputs[1]["path"] if isinstance(outputs[1], dict) else outputs[1]) as image:
        assert image.size == (32, 24)
    assert outputs[2] == "**Describe this.**"
    assert "before" not in json.dumps(outputs, default=str)
    assert "after" not in json.dumps(outputs, default=str)


def test_order_depends_on_the_seed_and_not_on_the_checkpoints(answers, tmp_path):
    def order(given, seed):
        return [answer.text for answer in AnnotationSession(given, tmp_path / VERDICTS, seed).answers]

    assert order(answers, 0) == order(answers[::-1], 0)
    assert any(order(answers, 0) != order(answers, seed) for seed in range(1, 5))


def test_equal_answers_of_two_checkpoints_are_shown_once(answers, tmp_path):
    same = AskedAnswer(**{**vars(answers[0]), "checkpoint": "third"})
    assert len(AnnotationSession([*answers, same], tmp_path / VERDICTS, 0).answers) == 4


def test_broken_line_is_dropped_and_the_last_verdict_counts(answers, tmp_path):
    lines = [{"answer": "a", "kinds": ["empty"]}, {"answer": "a", "kinds": []}, {"answer": "b", "kinds": ["dull"]}]
    (tmp_path / VERDICTS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"answer": "c", "ki')
    assert read_verdicts(tmp_path / VERDICTS) == {"a": []}
    with pytest.raises(ConfigError, match=r"--verdicts: there is no file .*judge_by_hand"):
        read_verdicts(tmp_path / "none.jsonl")


def test_folder_without_answers_is_an_error(script, tmp_path, capsys):
    assert script.main([str(tmp_path)]) == 2
    assert "answers.json: cannot be read" in capsys.readouterr().err


def test_images_that_are_gone_are_named_before_the_page_opens(script, answers, tmp_path, capsys):
    write_answers(tmp_path / "answers.json", answers)
    (tmp_path / "green.png").unlink()
    assert script.main([str(tmp_path)]) == 2
    assert f"1 images are not there, the first of them {tmp_path / 'green.png'}" in capsys.readouterr().err


def test_answers_are_read_as_they_were_written(answers, tmp_path):
    write_answers(tmp_path / "answers.json", answers)
    assert read_answers(tmp_path / "answers.json") == answers
