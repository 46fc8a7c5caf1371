"""A checkpoint belongs to its LLM and its vision side: a run does not go on from it with others of the same size."""

import shutil

import pytest
import torch

from minigpt4.common.run_checkpoints import card_path

AUTO = "run.resume_ckpt_path=auto"
KEYS = {"llm": "model.llama_model", "vit": "model.vit_weights", "q_former": "model.q_former_model"}


@pytest.fixture(scope="module")
def run(warm, make):
    """A finished run: (tiny, its folder)."""
    tiny = make("json")
    warm.train(tiny, "run.max_epoch=1")
    (folder,) = tiny.runs()
    return tiny, folder


@pytest.fixture(scope="module")
def others(tmp_path_factory, parity_dir):
    """Options that name parts of the same sizes with other numbers."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(parity_dir / "vicuna_tiny", folder / "vicuna_tiny")
    files = {"llm": "vicuna_tiny/pytorch_model.bin", "vit": "eva_vit_tiny.pth", "q_former": "blip2_tiny.pth"}
    for file in files.values():
        content = torch.load(parity_dir / file, weights_only=True)
        for tensor in content.get("model", content).values():
            if tensor.is_floating_point():
                tensor.mul_(1.25)
        torch.save(content, folder / file)
    places = {**files, "llm": "vicuna_tiny"}
    return {part: f"{KEYS[part]}={folder / place}" for part, place in places.items()}


@pytest.mark.parametrize("cached", [False, True], ids=["", "vision waits"])
@pytest.mark.parametrize("auto", [True, False], ids=["auto", "by path"])
@pytest.mark.parametrize("part", KEYS)
def test_a_run_is_not_resumed_with_another_part(part, auto, cached, run, others, warm, tmp_path):
    tiny, folder = run
    path = folder / "checkpoint_0.pth"
    options = [
        others[part],
        AUTO if auto else f"run.resume_ckpt_path={path}",
        *([f"run.feature_cache={tmp_path}"] * cached),
    ]
    refused = warm.start(tiny, *options)
    assert refused.wait() == [2], refused.text()
    assert f"error: {path}: was trained with" in refused.text()
    assert KEYS[part] in refused.text()
    assert f"model.ckpt_any_{'llm' if part == 'llm' else 'vision'}: True" in refused.text()


@pytest.mark.parametrize("part", KEYS)
def test_it_is_where_the_configuration_says_so(part, run, others, warm):
    tiny, folder = run
    allowed = f"model.ckpt_any_{'llm' if part == 'llm' else 'vision'}=True"
    going = warm.train(tiny, others[part], allowed, f"run.resume_ckpt_path={folder / 'checkpoint_0.pth'}")
    assert "Going on from" in going.text()


def test_an_old_card_that_names_no_vision_side_is_taken(run, others, warm, tmp_path):
    tiny, folder = run
    old = shutil.copytree(folder, tmp_path / folder.name)
    card = card_path(old / "checkpoint_0.pth")
    card.write_text(card.read_text().replace('"vision_fingerprints"', '"something"'))
    going = warm.train(tiny, others["vit"], f"run.resume_ckpt_path={old / 'checkpoint_0.pth'}")
    assert "Going on from" in going.text()
