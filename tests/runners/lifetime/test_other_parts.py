"""A checkpoint belongs to its LLM and its vision side: a run does not go on from it with others of the same size."""

import shutil

import pytest
import torch

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


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the checkpoint without its card, after an edit of its content."""

    def copy(edit=lambda content: None):
        content = torch.load(run[1] / "checkpoint_0.pth", weights_only=True)
        edit(content)
        torch.save(content, tmp_path / "copy.pth")
        return tmp_path / "copy.pth"

    return copy


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(("parts", "allow"), [(("llm",), "ckpt_any_llm"), (("vit", "q_former"), "ckpt_any_vision")])
def test_a_run_is_not_resumed_with_other_parts(parts, allow, copy, run, others, warm, copied, tmp_path):
    """By the newest checkpoint's card, and by a copy's own content, with a cache, so that the vision side waits."""
    tiny, folder = run
    path = copied() if copy else folder / "checkpoint_0.pth"
    options = [f"run.resume_ckpt_path={path}", f"run.feature_cache={tmp_path}/cache"] if copy else [AUTO]
    refused = warm.start(tiny, *(others[part] for part in parts), *options)
    assert refused.wait() == [2], refused.text()
    assert f"error: {path}: was trained with" in refused.text()
    assert f"model.{allow}: True" in refused.text()
    for part in parts:
        assert KEYS[part] in refused.text()


def test_it_is_where_the_configuration_says_so(run, others, warm):
    tiny, folder = run
    allowed = ("model.ckpt_any_llm=True", "model.ckpt_any_vision=True")
    path = f"run.resume_ckpt_path={folder / 'checkpoint_0.pth'}"
    assert "Going on from" in warm.train(tiny, *others.values(), *allowed, path).text()


def test_an_old_checkpoint_that_names_no_parts_is_taken(run, others, warm, copied):
    path = copied(lambda content: content["state"].pop("made_with"))
    assert "Going on from" in warm.train(run[0], *others.values(), f"run.resume_ckpt_path={path}").text()
