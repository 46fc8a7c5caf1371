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


@pytest.mark.parametrize(("auto", "cached"), [(True, False), (False, True)])  # with a cache the vision side waits
@pytest.mark.parametrize("part", KEYS)
def test_a_run_is_not_resumed_with_another_part(part, auto, cached, run, others, warm, tmp_path):
    tiny, folder = run
    path = folder / "checkpoint_0.pth"
    cache = [f"run.feature_cache={tmp_path}"] * cached
    refused = warm.start(tiny, others[part], AUTO if auto else f"run.resume_ckpt_path={path}", *cache)
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


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the checkpoint without its card, after an edit of its content."""

    def copy(edit):
        content = torch.load(run[1] / "checkpoint_0.pth", weights_only=True)
        edit(content)
        torch.save(content, tmp_path / "copy.pth")
        return f"run.resume_ckpt_path={tmp_path / 'copy.pth'}"

    return copy


@pytest.mark.parametrize("part", KEYS)
def test_a_copy_without_its_card_knows_its_parts(part, run, others, warm, copied):
    refused = warm.start(run[0], others[part], copied(lambda content: None))
    assert refused.wait() == [2], refused.text()
    assert KEYS[part] in refused.text()


def test_an_old_checkpoint_that_names_no_parts_is_taken(run, others, warm, copied):
    going = warm.train(run[0], others["vit"], copied(lambda content: content["state"].pop("made_with")))
    assert "Going on from" in going.text()
