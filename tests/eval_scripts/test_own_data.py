"""Evaluations of other data by YAML alone: COCO in Karpathy's form, and folders of images with references."""

import json
from pathlib import Path

import pytest
import yaml

from minigpt4.evaluation import score_captions

CONFIG = Path(__file__).parents[2] / "eval_configs" / "minigpt4_coco_eval.yaml"
SENTENCES = ["A brown dog sleeps.", "Two people walk.", "The table is set."]


@pytest.fixture
def coco(own, monkeypatch):
    """The shipped COCO configuration where its paths are files: 5 images of the test split among others."""
    monkeypatch.chdir(own.folder)
    own.take(CONFIG)
    (own.folder / "coco").mkdir()
    (own.folder / "images").rename(own.folder / "coco" / "val2014")
    images = [
        {
            "filepath": "val2014",
            "filename": f"10{number}.jpg",
            "cocoid": 900 + number,
            "imgid": number,
            "split": "test" if number % 2 else "val",
            "sentences": [{"raw": text} for text in (SENTENCES[number % 3], SENTENCES[(number + 1) % 3])],
        }
        for number in range(10)
    ]
    (own.folder / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return own


def _results(folder: Path) -> dict[str, str]:
    return {one["image_id"]: one["caption"] for one in json.loads((folder / "captions_pretrained.json").read_text())}


def _facts(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_shipped_coco_configuration_evaluates_the_test_split(coco, command, tmp_path):
    folder = coco.run("results", "--reference-mode", "separate", checkpoints=coco.checkpoints[:1])
    captions, facts = _results(folder), _facts(folder)
    assert list(captions) == ["901", "903", "905", "907", "909"]
    assert (facts["data"], facts["images"]) == ("coco_karpathy, test", 5)
    assert "in one sentence" in facts["prompt"]
    references = {str(900 + n): [SENTENCES[n % 3], SENTENCES[(n + 1) % 3]] for n in (1, 3, 5, 7, 9)}
    assert facts["checkpoints"][0]["scores"] == score_captions(captions, references)
    output = tmp_path / "again.json"
    arguments = [str(folder / "captions_pretrained.json"), "coco/dataset_coco.json", "--split", "test"]
    assert command("score_captions").main([*arguments, "--metrics", "BLEU", "--output", str(output)]) == 0
    again = json.loads(output.read_text())["scores"]
    assert again == {name: facts["checkpoints"][0]["scores"][name] for name in again}


def test_folder_of_images_with_references_needs_yaml_only(own, command, tmp_path):
    """The forms of references are those of tests/evaluation/test_caption_data.py; here COCO's own."""
    images = [{"id": 100 + n, "file_name": f"10{n}.jpg"} for n in range(3)]
    annotations = [{"image_id": 100 + n, "caption": text} for n in range(3) for text in SENTENCES[:2]]
    file = own.folder / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    info = {"test_ann_path": str(file), "image_path": str(own.folder / "images")}
    config = yaml.safe_load(own.config.read_text())
    config["datasets"] = {"mine": {"builder": "image_caption_json", "build_info": info}}
    own.config.write_text(yaml.safe_dump(config))
    folder = own.run("results", "--reference-mode", "separate", checkpoints=own.checkpoints[:1])
    captions = _results(folder)
    assert list(captions) == ["100", "101", "102"]
    scores = _facts(folder)["checkpoints"][0]["scores"]
    assert scores == score_captions(captions, dict.fromkeys(captions, SENTENCES[:2]))
    output = tmp_path / "again.json"
    arguments = [str(folder / "captions_pretrained.json"), str(file), "--output", str(output)]
    assert command("score_captions").main([*arguments, "--metrics", "BLEU", "CIDEr", "ROUGE-L"]) == 0
    assert json.loads(output.read_text())["scores"] == scores
