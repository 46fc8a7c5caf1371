"""Commands on files of captions, without a model: scores, and coverage by a judge on this machine."""

import json
import re

import pytest

from minigpt4.common.errors import SampleError
from minigpt4.evaluation import score_captions
from minigpt4.evaluation.bootstrap import ratio_interval, wilson
from minigpt4.evaluation.coverage import coverage

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


def test_one_image_has_no_intervals_and_missing_captions_are_named(main, files, tmp_path, capsys):
    one, (_, coco) = tmp_path / "one.json", files
    one.write_text(json.dumps(RESULTS[:1]))
    assert main([str(one), coco, *FAST, "--partial"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1 images")
    assert "95%" not in shown
    assert main([str(one), coco, *FAST]) == 2
    assert "1 images of the references have no caption: 7" in capsys.readouterr().err


# Coverage

CAPTIONS = {
    "1": ["a dog", "a red dog", "a cat", "two dogs", "an owl", "a sixth caption"],
    "2": ["a cat", "a bus", "a car", "a boat", "a bike"],
    "3": ["a bus", "a bus stop", "a road"],
    "4": ["a road"],
}
DESCRIPTIONS = {"1": "A red dog.", "2": "A cat, a bus and a car.", "3": "A dog.", "4": ""}


@pytest.fixture
def cover(command, chat_server, tmp_path, capsys):
    """`cover(*more)`: what the command prints and writes about these descriptions."""
    results = [{"image_id": key, "caption": text} for key, text in DESCRIPTIONS.items()]
    (tmp_path / "said.json").write_text(json.dumps(results))
    captions = [{"image_id": int(key), "caption": text} for key, own in CAPTIONS.items() for text in own]
    (tmp_path / "people.json").write_text(json.dumps({"annotations": captions}))
    files = [str(tmp_path / name) for name in ("said.json", "people.json")]
    judge = ["--judge-url", chat_server.url, "--judge-model", "tiny", "--judge-cache", str(tmp_path / "cache.jsonl")]
    output = tmp_path / "coverage.json"

    def cover(*more: str) -> tuple[str, dict]:
        assert command("eval_coverage").main([*files, *judge, "--output", str(output), *more]) == 0
        return capsys.readouterr().out, json.loads(output.read_text())

    return cover


def _words(request) -> tuple[str, list[str]]:
    """The description and the captions of a question."""
    text = request["messages"][-1]["content"]
    description = re.search(r"<description>\n(.*)\n</description>", text)[1]
    captions = re.findall(r"^\d\. (.*)$", text, re.MULTILINE) or re.findall(r"<caption>\n(.*)\n</caption>", text)
    return description, captions


def test_coverage_of_captions_asks_once_about_five_of_an_image_and_nothing_in_a_second_run(chat_server, cover):
    def numbered(request) -> str:
        description, captions = _words(request)
        return "\n".join(f"{n}. {'yes' if own in description.lower() else 'no'}" for n, own in enumerate(captions, 1))

    chat_server.answer = numbered
    shown, scored = cover("--judge-at-once", "1")
    assert [_words(one) for one in chat_server.requests] == [(DESCRIPTIONS[key], CAPTIONS[key][:5]) for key in CAPTIONS]
    assert [one["covered"] for one in scored["answers"]] == [[0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0], [0]]
    wanted = {"protocol": "captions", "score": 1.0, "interval": [*ratio_interval([1, 3, 0, 0], [1] * 4)], "images": 4}
    assert scored.items() >= (wanted | {"empty_descriptions": 1, "unparsable": []}).items()
    assert scored["judge"]["model"] == "tiny"
    assert "{description}" in scored["prompt"]["user"]
    assert shown.startswith("coverage, protocol captions: 1.0000 (95% ")
    assert "2 images have fewer than 5 captions" in shown
    chat_server.requests.clear()
    assert (cover(), chat_server.requests) == ((shown, scored), [])


def test_image_without_captions_is_named_before_the_judge_is_asked():
    with pytest.raises(SampleError, match="1 images have no captions, such as 3"):
        coverage(None, DESCRIPTIONS, CAPTIONS | {"3": []}, "captions")


def test_coverage_of_objects_is_the_share_that_covers_the_first_caption(chat_server, cover):
    chat_server.answer = lambda request: "Yes." if _words(request)[1][0] in _words(request)[0].lower() else "No."
    _, scored = cover("--protocol", "objects")
    assert [one["covered"] for one in scored["answers"]] == [[False], [True], [False], [False]]
    assert (scored["score"], scored["interval"], scored["covered"]) == (1 / 4, [*wilson(1, 4)], 1)


@pytest.mark.parametrize("protocol", ["captions", "objects"])
def test_replies_that_cannot_be_read_are_left_out_and_named(chat_server, cover, protocol, tmp_path):
    other = ("--protocol", protocol, "--judge-cache", str(tmp_path / "other.jsonl"))
    chat_server.answer = lambda request: "no\n" * len(_words(request)[1]) if "bus and" not in str(request) else "Well"
    _, scored = cover("--protocol", protocol)
    assert (scored["score"], scored["images"], scored["unparsable"]) == (0, 3, ["2"])
    chat_server.answer = lambda request: "Well ..."
    shown, scored = cover(*other)
    assert (scored["score"], scored["interval"]) == (None, None)
    assert f"coverage, protocol {protocol}: -" in shown
    assert "4 answers of the judge could not be read and are left out: images 1, 2, 3, 4" in shown
