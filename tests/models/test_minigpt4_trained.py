"""What is trained, how the optimizer groups it, and which checkpoints fill it."""

import pytest
import torch

from minigpt4.common.errors import WeightsError

CASES = {
    "freeze_all": {},
    "qformer_trainable": {"freeze_qformer": False},
    "vit_trainable": {"freeze_vit": False},
    "vit_trainable_noqformer": {"freeze_vit": False, "has_qformer": False},
}


@pytest.mark.parametrize("case", CASES)
def test_what_takes_gradients_and_weight_decay_is_that_of_the_reference_in_its_order(build_model, golden, case):
    expected = golden["train"]["weight_decay_groups"][case]
    model = build_model(ckpt=None, **CASES[case])
    if case == "freeze_all":
        assert list(model.trainable_parameters()) == golden["checkpoints"]["trainable_parameters"]
    names = {id(parameter): name for name, parameter in model.trainable_parameters().items()}
    groups = [(g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in model.get_optimizer_params(0.05)]
    assert groups == [(0.05, expected["decay"]), (0, expected["no_decay"])]


def test_a_trained_qformer_has_dropout_in_train_mode_only(build_model, pool):
    model = build_model(ckpt=None, freeze_qformer=False)
    model.train()
    assert not torch.equal(model.encode_img(pool)[0], model.encode_img(pool)[0])
    model.eval()
    assert torch.equal(model.encode_img(pool)[0], model.encode_img(pool)[0])


# Checkpoints


@pytest.mark.parametrize(
    ("file", "has_qformer"),
    [("minigpt4_tiny.pth", True), ("train_main_checkpoint_0.pth", True), ("minigpt4_tiny_noqformer.pth", False)],
)
def test_checkpoints_of_the_reference_load(build_model, parity_dir, file, has_qformer):
    path = parity_dir / file
    model = build_model(has_qformer=has_qformer, ckpt=str(path))
    stored = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.trainable_parameters().items())


def test_buffers_of_published_checkpoints_are_not_read(build_model, golden, parity_dir, changed_weights):
    buffers = golden["checkpoints"]["buffers_kept_in_checkpoints"]

    def spoil(state):
        for name in buffers:
            state[name] = torch.zeros(1)

    model = build_model(ckpt=str(changed_weights(parity_dir / "minigpt4_tiny.pth", spoil)))
    inverse = model.llama_model.model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse, 10000 ** (-torch.arange(0, 24, 2) / 24))


@pytest.mark.parametrize("frozen", ["freeze_qformer", "freeze_vit"])
def test_checkpoint_with_more_trained_parts_loads_where_they_are_trained_and_else_says_what_to_set(
    build_model, tmp_path, frozen
):
    state = dict(build_model(ckpt=None, **{frozen: False}).trainable_parameters())
    torch.save({"model": {name: parameter.detach() + 1 for name, parameter in state.items()}}, tmp_path / "more.pth")
    model = build_model(ckpt=str(tmp_path / "more.pth"), **{frozen: False})
    assert all(torch.equal(tensor, state[name] + 1) for name, tensor in model.trainable_parameters().items())
    with pytest.raises(WeightsError) as error:
        build_model(ckpt=str(tmp_path / "more.pth"))
    assert f"{tmp_path / 'more.pth'} does not fit the model.\n  not expected: " in str(error.value)
    assert f"model.{frozen}: False" in str(error.value)


def test_named_keys_may_be_missing_or_left_over(build_model, parity_dir, changed_weights):
    def change(state):
        del state["llama_proj.bias"]
        state["lora.weight"] = torch.ones(1)

    path = changed_weights(parity_dir / "minigpt4_tiny.pth", change)
    text = rf"{path} does not fit.*\n  missing: llama_proj.bias\n  not expected: lora.weight\n.*model.ckpt_allow_keys"
    with pytest.raises(WeightsError, match=text):
        build_model(ckpt=str(path))
    model = build_model(ckpt=str(path), ckpt_allow_keys=["lora.*", "llama_proj.bias"])
    stored = torch.load(path, weights_only=True)["model"]
    assert torch.equal(model.llama_proj.weight, stored["llama_proj.weight"])
