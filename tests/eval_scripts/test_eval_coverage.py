"""The coverage command from files to scores, with a judge on this machine."""

import json
import re

import pytest

RESULTS = [{"image_id": 42, "caption": "A dog sleeps on a blanket."}, {"image_id": 7, "caption": ""}]
COCO = {
    "annotations": [
        {"image_id": 42, "caption": "A dog sleeps"},
        {"image_id": 42, "caption": "A cat"},
        {"image_id": 7, "caption": "Two people walk"},
    ]
}


def _numbered(request) -> str:
    text = request["messages"][-1]["content"]
    return "\n".join(
        f"{number}. {'yes' if text.count(caption) > 1 else 'no'}"
        for number, caption in re.findall(r"^(\d)\. (.*)$", text, re.MULTILINE)
    )


@pytest.fixture
def arguments(chat_server, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    judge = ["--judge-url", chat_server.url, "--judge-model", "tiny", "--judge-cache", str(tmp_path / "cache.jsonl")]
    return [str(tmp_path / "results.json"), str(tmp_path / "coco.json"), *judge]


@pytest.fixture
def main(command):
    return command("eval_coverage").main


def test_captions_protocol_from_files_to_a_file(main, arguments, chat_server, tmp_path, capsys):
    chat_server.answer = _numbered
    assert main([*arguments, "--output", str(tmp_path / "coverage.json")]) == 0
    scored = json.loads((tmp_path / "coverage.json").read_text())
    wanted = {"protocol": "captions", "score": 0.5, "images": 2, "empty_descriptions": 1}
    assert scored.items() >= wanted.items()
    assert [one["covered"] for one in scored["answers"]] == [[True, False], [False]]
    assert scored["judge"]["model"] == "tiny"
    assert "{description}" in scored["prompt"]["user"]
    shown = capsys.readouterr().out
    assert shown.startswith("coverage, protocol captions: 0.5000 (95% ")
    assert "2 images have fewer than 5 captions" in shown


def test_second_run_asks_nothing_and_other_protocols_and_faults_are_named(main, arguments, chat_server, capsys):
    chat_server.answer = _numbered
    assert main(arguments) == 0
    first, asked = capsys.readouterr().out, len(chat_server.requests)
    assert main(arguments) == 0
    assert (capsys.readouterr().out, len(chat_server.requests)) == (first, asked)
    chat_server.answer = lambda request: "It depends."
    assert main([*arguments, "--protocol", "objects"]) == 0
    shown = capsys.readouterr().out
    assert "coverage, protocol objects: -" in shown
    assert "2 answers of the judge could not be read and are left out: images 42, 7" in shown
    chat_server.steps = [401, 401]
    assert main([*arguments, "--judge-cache", arguments[-1] + ".other"]) == 2
    assert "error: judge http://127.0.0.1" in capsys.readouterr().err
