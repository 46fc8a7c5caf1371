"""`encode_img` gives the reference's image tokens, at every size, with and without Q-Former."""

import pytest
import torch

from minigpt4.common.errors import SampleError

ATOL, STAGE_ATOL = 1e-5, 2e-5
VARIANTS = {"qformer": True, "noqformer": False}
CASES = [f"vision/{size}{variant}" for size in ("", "size28/", "size84/") for variant in VARIANTS]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_image_tokens_meet_the_reference(shared_model, golden_tensors, assert_near, case):
    images = golden_tensors[f"{case}/images"]
    model, seen = shared_model(image_size=images.shape[-1], has_qformer=VARIANTS[case.rsplit("/", 1)[-1]]), []
    handle = model.llama_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeds, atts = model.encode_img(images)
    handle.remove()
    assert_near(embeds, golden_tensors[f"{case}/inputs_llama"], ATOL)
    assert torch.equal(atts, golden_tensors[f"{case}/atts_llama"])
    # Without Q-Former the reference builds ln_vision and loads nothing into it.
    tokens = model.ln_vision(model.visual_encoder(images))
    assert_near(tokens, golden_tensors[f"{case}/ln_vision"], STAGE_ATOL)
    if "noqformer" in case:
        assert_near(seen[0], golden_tensors[f"{case}/merged4"], STAGE_ATOL)


@torch.no_grad()
def test_every_layer_meets_the_reference(model, golden_tensors, assert_near):
    bert, seen = model.Qformer.bert, {}
    layers = {f"vit_block{number}": block for number, block in enumerate(model.visual_encoder.model.blocks)}
    layers |= {f"qformer_hidden{n}": layer for n, layer in enumerate([bert.layernorm, *bert.encoder.layer])}
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
        for name, layer in layers.items()
    ]
    model.encode_img(golden_tensors["vision/qformer/images"])
    for handle in handles:
        handle.remove()
    assert len(seen) == 3 + 5
    for name, output in seen.items():
        output = output[0] if isinstance(output, tuple) else output
        assert_near(output, golden_tensors[f"vision/qformer/{name}"], 3e-5 if "vit" in name else STAGE_ATOL)


@torch.no_grad()
def test_norms_have_the_epsilons_of_the_reference(model, golden_tensors, assert_near):
    norms = {"vit_block0_norm1": model.visual_encoder.model.blocks[0].norm1, "ln_vision": model.ln_vision}
    norms |= {"qformer_embeddings_layernorm": model.Qformer.bert.layernorm}
    norms |= {"llama_final_norm": model.llama_model.model.norm}
    for name, norm in norms.items():
        probe = f"vision/eps_probe/{name}"
        assert_near(norm(golden_tensors[f"{probe}_in"]), golden_tensors[f"{probe}_out"], ATOL)


@torch.no_grad()
def test_several_images_a_sample_are_flattened(model, pool, golden_tensors, assert_near):
    embeds, atts = model.encode_img(pool.unflatten(0, (2, 3)))
    assert_near(embeds, golden_tensors["vision/five_dim/inputs_llama"], ATOL)
    assert atts.shape == embeds.shape[:2]


@pytest.mark.parametrize("shape", [(1, 3, 70, 70), (1, 3, 56, 70), (1, 1, 56, 56), (3, 56, 56), (2, 1, 3, 84, 84)])
def test_image_of_another_shape_is_refused_with_the_one_expected(model, shape):
    with pytest.raises(SampleError) as error:
        model.encode_img(torch.zeros(shape))
    text = str(error.value)
    assert f"image: shape {shape} does not fit" in text
    assert "expected (B, 3, 56, 56) or (B, n, 3, 56, 56) from model.image_size: 56" in text


def test_vision_is_frozen_unless_a_part_of_it_is_trained(shared_model):
    assert shared_model().vision_is_frozen
    assert not shared_model(freeze_qformer=False, ckpt_allow_keys=["Qformer.*", "query_tokens"]).vision_is_frozen
