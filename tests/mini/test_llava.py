"""LLaVA in the mini world: its tower, what counts as a right answer, and `minigpt4 quickstart --llava --fast`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel

from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.conversation.llava import SPEAKERS
from minigpt4.mini import files
from minigpt4.mini.llava import rightness, score, write_clip
from minigpt4.mini.scenes import conversation, sample_scenes
from minigpt4.models.vision_tower import build_vision_encoder, tower_pixels

ANSWERS = {
    "How many cats are there?": ("There are two cats.", "I can see two.", "There are three cats."),
    "How many things are left without the owls?": (
        *("There are four things in all. Of these two are taken away, so two are left.", "Two."),
        "There are four things in all, so one is left.",
    ),
    "Is there a bus?": ("No, there is no bus in the picture.", "No.", "Yes, there is one bus."),
    "Are there more cats than dogs?": (
        *("Yes. There are two cats and one dog, so there are more cats.", "yes, two to one"),
        "No. There are as many of one as of the other.",
    ),
    "Are the cats small or large?": ("They are large.", "Large ones", "They are small."),
    "What colour is the background?": ("It is pink.", "pink!", "It is pink and white."),
    "What can be seen?": ("Two cats and a dog.", "A dog beside two cats.", "Two cats."),
    "What is above the dog?": ("Two cats are above the dog.", "Above the dog is one cat.", "A bus is above the dog."),
    "If the picture were turned upside down, what would be at the top?": (
        *("The dog is at the bottom now. Turning swaps top and bottom, so the dog would be at the top.", "A dog"),
        "The cats would be at the top.",
    ),
}
"""The truth, an answer that is right in other words, and a wrong one."""


def test_the_clip_directory_gives_the_tokens_of_the_shipped_vision_weights(tmp_path):
    assert write_clip(tmp_path / "clip")
    assert not write_clip(tmp_path / "clip")
    tower = build_vision_encoder(MiniGPT4Config(image_size=files.IMAGE_SIZE, vit_config=dict(files.VIT_SIZES)))
    tower.model.load_state_dict({n: t.float() for n, t in torch.load(files.VIT_FILE, weights_only=True).items()})
    clip = CLIPVisionModel.from_pretrained(tmp_path / "clip").eval()
    assert tower_pixels(str(tmp_path / "clip")).image_size == files.IMAGE_SIZE
    image_B3SS = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own_BNV, clip_BNV = tower.eval()(image_B3SS), clip(image_B3SS).last_hidden_state
    expected_BNV = own_BNV - own_BNV.mean(-1, keepdim=True)
    torch.testing.assert_close(clip_BNV[..., :192], expected_BNV, atol=2e-2, rtol=0)
    assert expected_BNV.abs().max() > 20
    assert not clip_BNV[..., 192:].any()


@pytest.mark.parametrize("question", ANSWERS)
def test_an_answer_is_right_by_what_the_question_asks_for(question):
    truth, right, wrong = ANSWERS[question]
    shares = [rightness(question, "conv", answer, truth) for answer in (truth, right, wrong, "")]
    assert shares == [1, 1, 0, 0]


def test_a_description_counts_by_its_true_sentences():
    truth = "A cat above a dog on a pink background. The cat at the top is small. There are two things in all."
    for answer, share in ((truth, 1), (truth[:45], 1 / 3), ("The cat at the top is small.", 1 / 3), ("A cat.", 0)):
        assert rightness("Describe the picture in detail.", "detail", answer, truth) == pytest.approx(share)


def test_true_answers_are_all_right_and_those_of_other_scenes_are_not():
    questions, truth = {}, {}
    for kind, category in (("conversation", "conv"), ("detail", "detail"), ("complex_reasoning", "complex")):
        for number, scene in enumerate(sample_scenes("test", 40, seed=3)):
            texts = [turn["value"].replace("<image>", "").strip() for turn in conversation(scene, kind)]
            for place in range(0, len(texts), len(SPEAKERS)):
                questions[f"{kind} {number} {place}"] = {"text": texts[place], "category": category}
                truth[f"{kind} {number} {place}"] = texts[place + 1]
    own = score(questions, truth, truth)
    assert set(own["kinds"].values()) == set(own["asked"].values()) == {1.0}
    assert list(own["kinds"]) == ["conversation", "detail", "complex reasoning", "all"]
    keys = list(truth)
    other = score(questions, dict(zip(keys, [*map(truth.get, keys[1:]), truth[keys[0]]], strict=True)), truth)
    assert max(other["kinds"].values()) < 0.5


@pytest.mark.timeout(1800)
def test_both_stages_of_llava_run_and_report_from_the_wheel_without_a_checkout(
    tmp_path, installed, shallow_language_model
):
    (tmp_path / "data/mini").mkdir(parents=True)
    (tmp_path / "data/mini/smollm2-135m-instruct").symlink_to(shallow_language_model)  # the rest of the folder is empty
    command = [sys.executable, "-m", "minigpt4", "quickstart", "--llava", "--fast"]
    own = {"PYTHONPATH": str(installed), "TQDM_DISABLE": "1"}
    settings = {"cwd": tmp_path, "env": os.environ | own, "capture_output": True, "text": True}
    done = subprocess.run(command, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    output = tmp_path / "output/mini_llava/fast"
    report = json.loads((output / "report.json").read_text())
    assert list(report["scores"]) == ["stage 1", "stage 2"]
    assert report["scores"]["stage 2"]["kinds"].keys() == {"conversation", "detail", "complex reasoning", "all"}
    assert list(report["measures"]) == ["stage 1", "stage 2", "stage 2, shuffled"]
    assert (output / "report.txt").read_text() in done.stdout
    trained = torch.load(output / "stage2.pth", weights_only=True)["model"]
    assert {name.split(".")[0] for name in trained} == {"llama_proj", "llama_model"}
    with Image.open(output / "scenes.png") as figure:
        assert figure.width > 200
    again = subprocess.run(command, **settings)
    assert again.returncode == 0
    assert again.stdout.count("done before") == 4
