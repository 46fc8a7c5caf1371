"""Training batches: embeddings, masks, targets, loss and gradients are the reference's, case by case."""

import copy
import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minigpt4.common.errors import SampleError
from minigpt4.datasets.feature_store import CachedBatch
from minigpt4.models.feature_cache import FeatureEncoder
from minigpt4.models.prompting import read_samples

EMBEDS_ATOL = LOSS_ATOL = GRAD_ATOL = 1e-5
LOGITS_ATOL = 1e-4
SAMPLED_LOGITS = 16
WAYS = {
    "as the original": {"llm_packing": False, "llm_attention": "eager", "llm_logits": "all"},
    "padded": {"llm_packing": False},
    "packed": {"llm_prefix_cache": False},
    "packed, all logits": {"llm_prefix_cache": False, "llm_logits": "all"},
    "activation_checkpointing": {"llm_grad_checkpoint": True},
    "everything": {},
}
"""Changes of the `model:` section."""
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "parity" / "golden.json").read_text())["forward"]
CASES = [case["name"] for case in GOLDEN["cases"]]


def section_of(case, parity_dir):
    """Changes of the `model:` section that put the tiny model in the state of a case."""
    return {
        "has_qformer": case["has_qformer"],
        "max_txt_len": case["max_txt_len"],
        "max_context_len": case["max_context_len"],
        "end_sym": case["end_sym"],
        "prompt_path": str(parity_dir / case["prompt_file"]) if case["prompt_file"] else "",
        "prompt_template": case["prompt_template_arg"] or case["prompt_template_attribute"],
    }


def samples_of(case, pool):
    samples = copy.deepcopy(case["samples"])
    if case["image_pool_index"] is not None:
        samples["image"] = pool[torch.tensor(case["image_pool_index"])]
    if "length" in samples:
        samples["length"] = torch.tensor(samples["length"])
    return samples


@pytest.fixture(scope="module")
def results(build_model, parity_dir, pool):
    """What the model computed in a case; each case runs once each way."""

    @functools.cache
    def result(name: str, way: str) -> SimpleNamespace:
        case = next(case for case in GOLDEN["cases"] if case["name"] == name)
        return run_case(build_model(**section_of(case, parity_dir), **WAYS[way]).train(), case, pool)

    return result


def run_case(model, case, pool) -> SimpleNamespace:
    if case["chosen_prompt"]:
        assert case["chosen_prompt"] in model.prompt_list
        model.prompt_list = [case["chosen_prompt"]]
    given = {}
    model.llama_model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    samples = samples_of(case, pool)
    loss = model(samples, reduction=case["reduction"])["loss"]
    if loss.requires_grad:
        loss.sum().backward()
    batch, _ = model.training_batch(read_samples(samples))
    return SimpleNamespace(
        model=model,
        case=case,
        loss=loss.detach(),
        embeds=given["inputs_embeds"].detach(),
        mask=given["attention_mask"],
        targets=batch.targets_BT,
        lengths=batch.lengths_B,
    )


@pytest.mark.parametrize("name", CASES)
def test_embeddings_mask_targets_and_logits_meet_the_reference(results, golden_tensors, assert_near, name):
    result, expected = results(name, "padded"), f"forward/{name}"
    assert_near(result.embeds, golden_tensors[f"{expected}/inputs_embeds"], EMBEDS_ATOL)
    assert torch.equal(result.mask, golden_tensors[f"{expected}/attention_mask"])
    assert torch.equal(result.targets, golden_tensors[f"{expected}/targets"])
    with torch.no_grad():
        logits = result.model.llama_model(inputs_embeds=result.embeds, attention_mask=result.mask).logits
    assert_near(logits[..., :SAMPLED_LOGITS], golden_tensors[f"{expected}/logits_sample"], LOGITS_ATOL)


def test_features_of_several_images_a_sample_give_the_loss_of_their_pixels(results, pool):
    result = results("image_train_length", "padded")
    samples = samples_of(result.case, pool)
    image = CachedBatch("", result.model.image_features(samples["image"]), [], [], torch.empty(0))
    cached = FeatureEncoder(result.model).complete_batch({**samples, "image": image})
    assert cached["image"].features.shape[:2] == samples["image"].shape[:2]
    assert torch.equal(result.model(cached, reduction=result.case["reduction"])["loss"], result.loss)
    with pytest.raises(SampleError, match="length: 9 images in sample 0 of the batch, but image holds"):
        result.model({**cached, "length": torch.tensor([9, 1])})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_meet_the_reference(results, golden_tensors, assert_near, name, way):
    result = results(name, way)
    assert_near(result.loss, golden_tensors[f"forward/{name}/loss"], LOSS_ATOL)
    assert_near(result.loss, torch.tensor(result.case["loss"]), LOSS_ATOL)
    for part in ("weight", "bias"):
        expected = golden_tensors.get(f"forward/{name}/grad_llama_proj_{part}")
        grad = getattr(result.model.llama_proj, part).grad
        if expected is None:  # text alone: the projection is in the graph, so that DDP does not wait for it
            assert name == "text_only"
            assert not grad.any()
        else:
            assert_near(grad, expected, GRAD_ATOL)


@pytest.mark.parametrize("name", CASES)
def test_packing_leaves_the_tokens_without_padding_and_prefix(results, golden_tensors, assert_near, name):
    expected = golden_tensors[f"forward/{name}/inputs_embeds"]
    lengths = results(name, "packed").lengths
    tokens = torch.cat([row[:length] for row, length in zip(expected, lengths.tolist(), strict=True)])
    assert_near(results(name, "packed").embeds[0], tokens, EMBEDS_ATOL)
    left_out = len(tokens) - results(name, "everything").embeds.shape[1]
    assert left_out > 0
    assert left_out % len(lengths) == 0, "as many of each row"


# Prompts


@pytest.mark.parametrize("kind", ["vicuna", "llama2"])
def test_prompt_list_meets_the_reference(build_model, parity_dir, kind):
    expected = GOLDEN["prompt_list_from_config"][kind]
    path = str(parity_dir / "prompts_tiny.txt")
    model = build_model(prompt_path=path, prompt_template=expected["prompt_template"])
    assert model.prompt_list == expected["prompt_list"]


def test_prompts_are_drawn_in_the_order_of_the_reference(build_model, parity_dir, pool):
    drawn = [int(choice[1:]) for choice in GOLDEN["python_random_seed42_choice_of_4"]]
    random.seed(42)
    model = build_model(prompt_path=str(parity_dir / "prompts_tiny.txt"))  # the constructor draws the first
    ends = [prompt.split("<ImageHere>")[1] for prompt in model.prompt_list]
    for number in drawn[1:]:
        batch, _ = model.training_batch(read_samples({"image": pool[:2], "answer": ["a", "b"]}))
        for text in model.llama_tokenizer.batch_decode(batch.ids_BT):  # one prompt for the whole batch
            assert [end in text for end in ends] == [index == number for index in range(len(ends))]


# Candidates


@pytest.mark.parametrize(("field", "num_cand"), [("ranks", None), ("ranks_num_cand", "num_cand")])
def test_multi_select_ranks_meet_the_reference(shared_model, pool, field, num_cand):
    case = GOLDEN["multi_select"]
    model = shared_model(end_sym=case["end_sym"], max_txt_len=160)
    images = pool[torch.tensor(case["image_pool_index"])]
    ranks = model.multi_select(images, case["texts"], case["answers"], case[num_cand] if num_cand else None)
    assert ranks == case[field]


def test_batch_whose_samples_have_none_of_the_images_keeps_the_trained_parts_in_the_graph(build_model, pool):
    model = build_model()
    batch = {"image": pool[:4].unflatten(0, (2, 2)), "length": [0, 0], "answer": ["a", "b"]}
    model(batch | {"instruction_input": ["Say a.", "Say b."]})["loss"].backward()
    assert all(not p.grad.any() for p in model.trainable_parameters().values())


def test_unknown_reduction_is_refused(model, pool):
    with pytest.raises(ValueError, match="reduction: 'sum' is neither 'mean' nor 'none'"):
        model({"image": pool[:1], "answer": ["a"]}, reduction="sum")
