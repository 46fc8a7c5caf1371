"""`encode_img` gives the reference's image tokens, at every size, with and without Q-Former."""

import pytest
import torch

from minigpt4.common.errors import SampleError

ATOL = 1e-5
MERGED_ATOL = LN_VISION_ATOL = 2e-5
VARIANTS = {"qformer": True, "noqformer": False}
SIZES = [
    (56, "vision/qformer"),
    (56, "vision/noqformer"),
    *((size, f"vision/size{size}/{variant}") for size in (28, 84) for variant in VARIANTS),
]


def model_of(shared_model, size, case):
    return shared_model(image_size=size, has_qformer=VARIANTS[case.rsplit("/", 1)[-1]])


@pytest.mark.parametrize(("size", "case"), SIZES)
@torch.no_grad()
def test_every_stage_meets_the_reference(shared_model, golden_tensors, assert_near, size, case):
    model, seen = model_of(shared_model, size, case), []
    handle = model.llama_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = golden_tensors[f"{case}/images"]
    embeds, atts = model.encode_img(images)
    handle.remove()
    assert_near(embeds, golden_tensors[f"{case}/inputs_llama"], ATOL)
    assert torch.equal(atts, golden_tensors[f"{case}/atts_llama"])
    # Without Q-Former the reference builds ln_vision and loads nothing into it.
    tokens = model.ln_vision(model.visual_encoder(images))
    assert_near(tokens, golden_tensors[f"{case}/ln_vision"], LN_VISION_ATOL)
    if "noqformer" in case:
        assert_near(seen[0], golden_tensors[f"{case}/merged4"], MERGED_ATOL)


@torch.no_grad()
def test_several_images_a_sample_are_flattened(shared_model, pool, golden_tensors, assert_near):
    embeds, atts = shared_model().encode_img(pool.unflatten(0, (2, 3)))
    assert_near(embeds, golden_tensors["vision/five_dim/inputs_llama"], ATOL)
    assert atts.shape == embeds.shape[:2]


@torch.no_grad()
def test_final_norm_of_the_llm_has_the_epsilon_of_the_reference(shared_model, golden_tensors, assert_near):
    probe = "vision/eps_probe/llama_final_norm"
    norm = shared_model().llama_model.model.norm
    assert_near(norm(golden_tensors[f"{probe}_in"]), golden_tensors[f"{probe}_out"], ATOL)


@pytest.mark.parametrize("shape", [(1, 3, 70, 70), (1, 3, 56, 70), (1, 1, 56, 56), (3, 56, 56), (2, 1, 3, 84, 84)])
def test_image_of_another_shape_is_refused_with_the_one_expected(shared_model, shape):
    with pytest.raises(SampleError) as error:
        shared_model().encode_img(torch.zeros(shape))
    text = str(error.value)
    assert f"image: shape {shape} does not fit" in text
    assert "expected (B, 3, 56, 56) or (B, n, 3, 56, 56) from model.image_size: 56" in text


def test_projection_alone_takes_gradients_from_image_tokens(build_model, pool):
    model = build_model()
    embeds, _ = model.encode_img(pool[:1])
    embeds.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        "llama_proj.weight",
        "llama_proj.bias",
    }


# Features that are kept


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_kept_features_give_the_image_tokens_of_every_projection(build_model, pool, variant):
    model = build_model(has_qformer=VARIANTS[variant]).eval()
    features = model.image_features(pool[:2])
    before = model.encode_img(pool[:2])[0]
    assert torch.equal(model.project(features), before)
    model.llama_proj.weight.mul_(0.5)
    assert torch.equal(model.project(features), model.encode_img(pool[:2])[0])
    assert not torch.equal(model.project(features), before)


def test_vision_is_frozen_unless_a_part_of_it_is_trained(shared_model):
    assert shared_model().vision_is_frozen
    assert not shared_model(freeze_qformer=False, ckpt_allow_keys=["Qformer.*", "query_tokens"]).vision_is_frozen
