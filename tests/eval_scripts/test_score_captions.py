"""Commands on files of captions, without a model: scores, and coverage by a judge on this machine."""

import json
import re

import pytest

from minigpt4.evaluation import score_captions

RESULTS = [{"image_id": 42, "caption": "A dog sleeps on a blanket."}, {"image_id": 7, "caption": ""}]
REFERENCES = {"42": ["A dog sleeps", "A cat"], "7": ["Two people walk"]}
COCO = {"annotations": [{"image_id": int(key), "caption": text} for key, own in REFERENCES.items() for text in own]}
FAST = ("--metrics", "BLEU", "CIDEr", "ROUGE-L")


@pytest.fixture
def main(command):
    return command("score_captions").main


@pytest.fixture
def files(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    return str(tmp_path / "results.json"), str(tmp_path / "coco.json")


def test_coco_results_are_scored_against_coco_annotations(main, files, tmp_path, capsys):
    assert main([*files, *FAST, "--output", str(tmp_path / "scores.json")]) == 0
    scored = json.loads((tmp_path / "scores.json").read_text())
    captions = {str(one["image_id"]): one["caption"] for one in RESULTS}
    assert scored["scores"] == score_captions(captions, REFERENCES)
    assert (scored["images"], scored["empty_captions"], scored["reference_mode"]) == (2, 1, "separate")
    assert set(scored["intervals"]) == set(scored["scores"])
    shown = capsys.readouterr().out
    assert shown.startswith("2 images, references separate, 1 empty captions\n")
    assert f"| results | {scored['scores']['BLEU-1']:.4f} |" in shown


def test_file_of_caption_py_scores_as_the_evaluation(main, complete, shared, load_script, tmp_path):
    images, file = str(shared.folder / "test.json"), tmp_path / "captions.jsonl"
    where = ["--images", images, "--image-folder", str(shared.folder / "images"), "--output", str(file)]
    arguments = ["--cfg-path", str(shared.config), "--ckpt", f"{shared.folder}/checkpoint_0.pth", *where]
    assert load_script("scripts/caption.py").main(arguments) == 0
    said = [json.loads(line) for line in file.read_text().splitlines()]
    evaluated = json.loads((complete / "captions_epoch_0.json").read_text())
    assert [{"image_id": line["image_id"], "caption": line["caption"]} for line in said] == evaluated
    output = tmp_path / "scores.json"
    assert main([str(file), images, *FAST, "--reference-mode", "joined", "--output", str(output)]) == 0
    facts = json.loads((complete / "metrics.json").read_text())
    (epoch,) = [one for one in facts["checkpoints"] if one["name"] == "epoch 0"]
    scored = json.loads(output.read_text())
    assert (scored["scores"], scored["intervals"]) == (epoch["scores"], epoch["intervals"])


def test_one_image_has_no_intervals_and_faults_are_named(main, files, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(RESULTS[:1]))
    (tmp_path / "blank.json").write_text(json.dumps([{"image_id": "42", "caption": " "}]))
    one, results, coco = str(tmp_path / "one.json"), *files
    assert main([one, coco, *FAST, "--partial"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1 images")
    assert "95%" not in shown
    for given, text in (
        ([one, coco], "1 images of the references have no caption: 7"),
        ([results, str(tmp_path / "blank.json")], "blank.json, record 1: "),
        (["nowhere.json", coco], "error: nowhere.json: cannot be read"),
    ):
        assert main([*given, *FAST]) == 2
        assert text in capsys.readouterr().err


# Coverage


def _numbered(request) -> str:
    text = request["messages"][-1]["content"]
    captions = re.findall(r"^(\d)\. (.*)$", text, re.MULTILINE)
    return "\n".join(f"{number}. {'yes' if text.count(own) > 1 else 'no'}" for number, own in captions)


def test_coverage_from_files_to_a_file_and_a_second_run_asks_nothing(files, command, chat_server, tmp_path, capsys):
    main, cache = command("eval_coverage").main, str(tmp_path / "cache.jsonl")
    arguments = [*files, "--judge-url", chat_server.url, "--judge-model", "tiny", "--judge-cache", cache]
    chat_server.answer = _numbered
    assert main([*arguments, "--output", str(tmp_path / "coverage.json")]) == 0
    scored = json.loads((tmp_path / "coverage.json").read_text())
    wanted = {"protocol": "captions", "score": 0.5, "images": 2, "empty_descriptions": 1}
    assert scored.items() >= wanted.items()
    assert [one["covered"] for one in scored["answers"]] == [[True, False], [False]]
    assert scored["judge"]["model"] == "tiny"
    assert "{description}" in scored["prompt"]["user"]
    shown, asked = capsys.readouterr().out, len(chat_server.requests)
    assert shown.startswith("coverage, protocol captions: 0.5000 (95% ")
    assert "2 images have fewer than 5 captions" in shown
    assert main(arguments) == 0
    assert (capsys.readouterr().out, len(chat_server.requests)) == (shown, asked)
    chat_server.answer = lambda request: "It depends."
    assert main([*arguments, "--protocol", "objects"]) == 0
    shown = capsys.readouterr().out
    assert "coverage, protocol objects: -" in shown
    assert "2 answers of the judge could not be read and are left out: images 42, 7" in shown
    chat_server.steps = [401, 401]
    assert main([*arguments, "--judge-cache", f"{cache}.other"]) == 2
    assert "error: judge http://127.0.0.1" in capsys.readouterr().err
