"""LLaVA's features, sequences, loss and gradients are the reference's."""

import json
from pathlib import Path

import pytest
import torch

from minigpt4.check import expected_lengths
from minigpt4.common.errors import SampleError
from minigpt4.common.llava_schema import LlavaConfig as OwnConfig
from minigpt4.conversation.llava import LLAVA_TEMPLATES
from minigpt4.models.connectors import build_projection
from minigpt4.models.loading import feature_shape
from minigpt4.models.prompting import embed, read_samples

FEATURES_ATOL = EMBEDS_ATOL = 2e-5
LOGITS_ATOL = 5e-5
LOSS_ATOL = GRAD_ATOL = 1e-5
FOLDER = Path(__file__).parents[1] / "data" / "parity_llava"
GOLDEN = json.loads((FOLDER / "model.json").read_text(encoding="utf-8"))
RECORDS = {name: json.loads((FOLDER / "data" / f"{name}.json").read_text()) for name in ("pretrain", "instruct")}
FORWARD = {case["name"]: case for case in GOLDEN["forward"]["cases"]}
RECORDS_OF = {
    "stage1": ("pretrain", (0, 1, 2, 5)),
    "stage2": ("instruct", (0, 1, 2, 5, 12)),
    "text": ("instruct", (5, 7)),
}
WAYS = {
    "as the original": {"llm_packing": False, "llm_attention": "eager", "llm_logits": "all"},
    "padded on the left": {"tokenizer_padding_side": "left"},
    "everything": {},
}
PICTURES = ("img0_rgb_nonsquare.png", "img1_rgba.png", "img2_gray.png", "img3_rgb.png")


def conversations(file: str, indices) -> list[list[dict]]:
    return [RECORDS[file][index]["conversations"] for index in indices]


def as_read(turn: str) -> str:
    """With its image at the front."""
    return f"<image>\n{turn.replace('<image>', '').strip()}" if "<image>" in turn else turn


def samples_of(file: str, indices, images, length=None) -> dict:
    samples = {"conversations": conversations(file, indices), "image": images}
    return samples if length is None else samples | {"length": torch.tensor(length)}


# Vision


@pytest.mark.parametrize("case", GOLDEN["vision"]["cases"], ids=lambda case: case["tensor"])
def test_features_are_the_chosen_layer_without_norm(llava, llava_tensors, llava_pixels, assert_near, case):
    prefix = "keep" if case["select_feature"] == "cls_patch" else None
    model = llava(vit_layer=case["select_layer"], vit_prefix=prefix)
    pixels = llava_tensors["images/plain/pixel_values"][: case["images"]]
    assert_near(model.image_features(pixels), llava_tensors[case["tensor"]], FEATURES_ATOL)


@pytest.mark.parametrize("projection", GOLDEN["projector"])
@pytest.mark.parametrize("mode", ["plain", "pad"])
def test_image_tokens(llava, llava_tensors, assert_near, projection, mode):
    model = llava(projection=projection)
    embeds, mask = model.encode_img(llava_tensors[f"images/{mode}/pixel_values"])
    assert_near(embeds, llava_tensors[f"projector/{projection}/{mode}"], FEATURES_ATOL)
    assert mask.shape == embeds.shape[:2]
    sizes = GOLDEN["projector"][projection]
    assert {name: list(p.shape) for name, p in model.trainable_parameters().items()} == {
        f"llama_proj.{name}": shape for name, shape in sizes["keys"].items()
    }


# Sequences: what the reference makes of a batch, as far as samples can say it


def spliced(model, samples):
    """Embeddings, zero where padded, mask and targets of a training batch."""
    batch, tokens = model.training_batch(read_samples(samples))
    embeds = embed(batch, model.llama_model.get_input_embeddings(), tokens)
    return embeds * batch.attention_mask_BT[..., None], batch.attention_mask_BT, batch.targets_BT


SPLICED = {
    "one_image_each": ((0, 1, 3), PICTURES[0:2] + PICTURES[3:], None, {}),
    "one_image_each_mlp": ((0, 1, 3), PICTURES[0:2] + PICTURES[3:], None, {"projection": "mlp2x_gelu"}),
    "text_image_text": ((5, 2, 7), ("zeros", PICTURES[2], "zeros"), (0, 1, 0), {}),
    "all_text": ((5, 7), ("zeros", "zeros"), (0, 0), {}),
    "list_of_images": ((1,), PICTURES[:2], (2,), {}),
    "five_dims": ((1, 7), PICTURES, (2, 0), {}),
    "truncated": ((0, 2, 7), (PICTURES[0], PICTURES[2], "zeros"), (1, 1, 0), {"tokenizer_model_max_length": 70}),
    "left_padding": ((0, 2, 7), (PICTURES[0], PICTURES[2], "zeros"), (1, 1, 0), {"tokenizer_padding_side": "left"}),
    "too_many_images": ((1,), PICTURES[:1], None, {}),
    "cls_patch": ((1,), PICTURES[1:2], None, {"vit_prefix": "keep"}),
    "plain_pretrain": ((0, 1, 2, 3), PICTURES, None, {"conv_template": "plain"}),
}
"""Records, pictures, how many each sample has (None: one), and keys of the section."""


@pytest.mark.parametrize("name", SPLICED)
def test_images_are_spliced_into_texts_as_by_the_reference(llava, llava_tensors, llava_pixels, assert_near, name):
    records, pictures, length, changes = SPLICED[name]
    images = llava_pixels(*pictures)
    file = "pretrain" if name.startswith("plain") else "instruct"
    samples = samples_of(file, records, images if length is None else images.unflatten(0, (len(records), -1)), length)
    embeds, mask, targets = spliced(llava(**changes), samples)
    assert_near(embeds, llava_tensors[f"multimodal/{name}/inputs_embeds"], EMBEDS_ATOL)
    if f"multimodal/{name}/attention_mask" in llava_tensors:
        assert torch.equal(mask, llava_tensors[f"multimodal/{name}/attention_mask"].long())
    assert name == "cls_patch" or torch.equal(targets, llava_tensors[f"multimodal/{name}/labels"])


def test_text_alone_is_the_ids_of_its_turns(llava, llava_tensors):
    expected = {name: llava_tensors[f"multimodal/images_none/{name}"] for name in ("input_ids", "labels")}
    batch, tokens = llava().training_batch(read_samples({"conversations": conversations("instruct", (5, 7))}))
    assert tokens is None
    assert torch.equal(batch.ids_BT, expected["input_ids"])
    assert torch.equal(batch.targets_BT, expected["labels"])


@pytest.mark.parametrize(
    ("name", "records", "pictures"),
    [("no_mask_no_labels", (1,), PICTURES[1:2]), ("no_mask_batch", (0, 2, 7), (PICTURES[0], PICTURES[2], None))],
)
def test_prompts_are_rows_of_the_reference_padded_on_the_left(
    llava, llava_tensors, llava_pixels, assert_near, name, records, pictures
):
    model, template = llava(), LLAVA_TEMPLATES["v1"]
    talks = [[(t["from"] == "gpt", as_read(t["value"])) for t in own] for own in conversations("instruct", records)]
    images = [list(model.encode_img(llava_pixels(picture))[0].split(1)) if picture else [] for picture in pictures]
    embeds, mask = model.prompt_embeds([template.prompt(turns) for turns in talks], images)
    for row, own, expected in zip(embeds, mask.bool(), llava_tensors[f"multimodal/{name}/inputs_embeds"], strict=True):
        assert_near(row[own], expected[: int(own.sum())], EMBEDS_ATOL)


def test_prompts_hold_several_images_where_they_say(llava, llava_tensors, llava_pixels, assert_near):
    model, text = llava(), "USER: <image> and <image>\nCompare. ASSISTANT: Same.</s>"
    images = [embeds[None] for embeds in model.encode_img(llava_pixels(PICTURES[0], PICTURES[3]))[0]]
    embeds, mask = model.prompt_embeds([text], [images])
    expected = llava_tensors["multimodal/two_images_one_none/inputs_embeds"][0]
    assert mask.all()
    assert_near(embeds[0], expected[: embeds.shape[1]], EMBEDS_ATOL)


# Loss


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORWARD)
def test_loss_and_gradients_are_those_of_the_reference(
    build_llava, llava_tensors, llava_pixels, assert_near, name, way
):
    case, (file, indices) = FORWARD[name], RECORDS_OF[name.split("_")[0]]
    template = "plain" if file == "pretrain" else "llava_v0" if name.endswith("v0") else "v1"
    model = build_llava(projection=case["projector"], conv_template=template, **WAYS[way]).train()
    images = llava_pixels(*case["images"], mode=case["image_mode"])[:, None]
    samples = samples_of(file, indices, images, [int(image != "zeros") for image in case["images"]])
    result = model(samples)
    result["loss"].backward()
    assert_near(result["loss"][None], llava_tensors[f"forward/{name}/loss"], LOSS_ATOL)
    assert result["num_tokens"] == case["supervised_tokens"]
    for parameter_name, parameter in model.trainable_parameters().items():
        published = parameter_name.replace("llama_proj", "model.mm_projector")
        assert_near(parameter.grad, llava_tensors[f"forward/{name}/grad/{published}"], GRAD_ATOL)
    if way == "as the original":
        embeds, mask, _ = spliced(model, samples)
        logits = model.llama_model(inputs_embeds=embeds, attention_mask=mask).logits * mask[..., None]
        expected = llava_tensors[f"forward/{name}/logits_sample"] * mask[:, ::5, None]
        assert_near(logits[:, ::5, ::7], expected, LOGITS_ATOL)


@pytest.mark.parametrize("images", [None, 0])
def test_text_alone_gives_the_projector_a_gradient_of_zeros(build_llava, llava_pixels, images):
    model = build_llava()
    samples = samples_of("instruct", (5, 7), llava_pixels("zeros", "zeros")[:, None], (0, 0))
    if images is None:
        del samples["image"], samples["length"]
    model(samples)["loss"].backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.trainable_parameters().values())


def test_batch_without_targets_counts_for_nothing(build_llava, llava_pixels, caplog):
    model = build_llava(tokenizer_model_max_length=40)
    result = model(samples_of("instruct", (0,), llava_pixels(PICTURES[0])))
    result["loss"].backward()
    assert (result["loss"].item(), result["num_tokens"]) == (0.0, 0)
    assert not any(p.grad.any() for p in model.trainable_parameters().values())
    assert "Nothing to train on: no answer within tokenizer_model_max_length in sample 0 of the batch" in caplog.text


def test_conversations_are_not_for_minigpt4(model, pool):
    with pytest.raises(SampleError, match="'conversations' are read by a model of arch: llava"):
        model(samples_of("instruct", (0,), pool[:1]))


def test_samples_of_other_datasets_become_questions_of_the_template(llava, llava_pixels):
    model, images = llava(), llava_pixels(*PICTURES[:1])
    question, answer = (turn["value"] for turn in RECORDS["instruct"][2]["conversations"])
    asked = question.replace("<image>\n", "<Img><ImageHere></Img> ")
    samples = {"conv_q": [asked], "conv_a": [answer], "connect_sym": "$", "image": images}
    own, _ = model.training_batch(read_samples(samples))
    theirs, _ = model.training_batch(read_samples(samples_of("instruct", (2,), images)))
    assert torch.equal(own.ids_BT, theirs.ids_BT)
    assert torch.equal(own.targets_BT, theirs.targets_BT)


# Sizes of the published models, without their files


@pytest.mark.parametrize(("name", "tokens"), [("clip-vit-large-patch14", 256), ("clip-vit-large-patch14-336", 576)])
def test_published_towers_are_known_before_they_are_there(tmp_path, name, tokens):
    cfg = OwnConfig(vit_model=str(tmp_path / name))
    assert feature_shape(cfg) == (tokens, 1024)
    assert expected_lengths(cfg).answer == 2048 - 1 - tokens
    for projection, parameters in (("linear", 4_198_400), ("mlp2x_gelu", 20_979_712)):
        with torch.device("meta"):
            built = build_projection(OwnConfig(projection=projection), 1024, 4096)
        assert sum(p.numel() for p in built.parameters()) == parameters
