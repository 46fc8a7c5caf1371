"""LLaVA answers as the reference does, alone and in a chat; its weights are read strictly, in all of its layouts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from minigpt4 import pipeline
from minigpt4.common.config import Config
from minigpt4.common.errors import SampleError, WeightsError
from minigpt4.models.generation import Decoding, generate_ids
from minigpt4.models.loading import load_vision
from minigpt4.processors import open_image
from minigpt4.serving.loading import checkpoints

FOLDER = Path(__file__).parents[1] / "data" / "parity_llava"
GENERATE = json.loads((FOLDER / "model.json").read_text(encoding="utf-8"))["generate"]["cases"]
QUESTION = "<image>\nWhat is it?"


@pytest.mark.parametrize("case", GENERATE, ids=lambda case: f"{case['template']}-{case['image']}")
def test_answers_are_those_of_the_reference(llava, llava_pixels, case):
    model = llava(projection=case["projector"])
    images = llava_pixels(case["image"]) if case["image"] else None
    for run in case["runs"]:
        prompts = model.prompt_embeds([case["prompt"]], model._image_lists(images, 1))
        (ids,) = generate_ids(model.llama_model, model.llama_tokenizer, *prompts, Decoding(**run["kwargs"])).tolist()
        assert ids == run["output_ids"]
        assert model.generate(images, [case["prompt"]], **run["kwargs"]) == [run["text"].strip()]


def test_rows_of_a_batch_answer_as_alone(llava, llava_pixels):
    cases = [case for case in GENERATE if case["projector"] == "linear"]
    images = [llava_pixels(case["image"])[0] if case["image"] else None for case in cases]
    answers = llava().generate(images, [case["prompt"] for case in cases], **cases[0]["runs"][0]["kwargs"])
    assert answers == [case["runs"][0]["text"].strip() for case in cases]


@pytest.mark.parametrize("prompt", ["What is it?", f"{QUESTION} {QUESTION}"])
def test_images_and_placeholders_must_match(llava, llava_pixels, prompt):
    with pytest.raises(SampleError, match=r"texts\[0\]: the prompt has \d <image>, but 1 images were given"):
        llava().generate(llava_pixels("img3_rgb.png"), [prompt])


# New tokens


@pytest.mark.parametrize("keys", [["mm_use_im_start_end"], ["mm_use_im_patch_token", "mm_use_im_start_end"]])
def test_new_tokens_begin_as_the_mean_of_all(build_llava, llava, keys):
    model, old = build_llava(**dict.fromkeys(keys, True)), llava()
    names = ["<im_patch>"] * (len(keys) - 1) + ["<im_start>", "<im_end>"]
    ids = model.llama_tokenizer.convert_tokens_to_ids(names)
    assert ids == list(range(578, 578 + len(names)))
    for part in ("get_input_embeddings", "get_output_embeddings"):
        table, before = (getattr(one.llama_model, part)().weight for one in (model, old))
        assert torch.equal(table[:578], before)
        torch.testing.assert_close(table[578:], before.mean(dim=0).expand(len(names), -1))
    assert not any(p.requires_grad for p in model.llama_model.parameters())


# Weights


def write(path, state):
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model.", "module.model."])
def test_projector_is_what_follows_its_name(build_llava, llava, tmp_path, prefix):
    state = torch.load(FOLDER / "projector_linear.bin", weights_only=True)
    named = {f"{prefix}mm_projector.{name.rpartition('.')[2]}": tensor + 1 for name, tensor in state.items()}
    model = build_llava(ckpt=write(tmp_path / "mm_projector.bin", named))
    assert torch.equal(model.llama_proj.weight, llava().llama_proj.weight + 1)


@pytest.mark.parametrize(("projection", "names"), [("mlp1x_gelu", "0"), ("mlp3x_gelu", "024")])
def test_mlp_of_any_depth_has_the_published_names(build_llava, projection, names):
    wanted = [f"llama_proj.{name}.{part}" for name in names for part in ("weight", "bias")]
    assert list(build_llava(projection=projection).trainable_parameters()) == wanted


@pytest.fixture
def whole(tmp_path):
    """`whole(change)`: a copy of the whole LLaVA whose tensors went through `change`."""

    def copy(change=lambda tensors: None):
        folder = Path(shutil.copytree(FOLDER / "stage2_linear", tmp_path / "llava"))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def test_whole_llava_brings_projection_llm_and_tower(build_llava, whole, capfd):
    names = ("model.mm_projector.", "model.vision_tower.vision_tower.vision_model.")

    def change(tensors):
        for name in tensors:
            if name.startswith(names[1]):
                tensors[name] += 0.25

    folder = whole(change)
    tensors = load_file(folder / "model.safetensors")
    model = build_llava(llama_model=str(folder), ckpt=None)
    parts = {names[0]: model.llama_proj, "": model.llama_model}
    for prefix, part in parts.items():
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, tensors[prefix + name]), name
    tower, *_ = load_vision(model.cfg)
    for name, parameter in tower.model.named_parameters():
        assert torch.equal(parameter, tensors[names[1] + name]), name
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("change", "keys", "text"),
    [
        (lambda t: t.pop("model.mm_projector.bias"), {}, "missing: bias"),
        (lambda t: t.pop("model.norm.weight"), {}, "missing model.norm.weight"),
        (lambda t: t.update(other=torch.ones(1)), {}, "not expected other"),
        (lambda t: t.pop("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"), {}, "pre_layrnorm.bias"),
        (lambda t: None, {"projection": "mlp2x_gelu"}, "model.projection: mlp2x_gelu must be linear, as"),
        (lambda t: None, {"vit_layer": -1}, "model.vit_layer: -1 must be -2, as mm_vision_select_layer"),
        ({"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}, {}, "it is a LLaVA 1.6"),
        ({"model_type": "llava_mistral"}, {}, "no model type 'llava_mistral'; of LLaVA's kind those on a LLaMA"),
        ({"model_type": "llava_next", "text_config": {}}, {}, "in the layout of transformers"),
    ],
)
def test_whole_llava_is_read_strictly(build_llava, whole, change_json, change, keys, text):
    """Changed are its tensors or its config.json, or the keys beside it."""
    folder = whole(change) if callable(change) else whole()
    if not callable(change):
        change_json(folder / "config.json", **change)
    with pytest.raises(WeightsError) as error:
        build_llava(llama_model=str(folder), ckpt=None, **keys)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image_aspect_ratio": "pad"}, "model.image_aspect_ratio: square, but image_aspect_ratio of "),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "clip-vit-large-patch14-336: answers may be worse"),
        ({"mm_vision_tower": "somewhere/CLIP_tiny@main"}, ""),
    ],
)
def test_whole_llava_made_for_other_images_is_told(build_llava, whole, change_json, caplog, changes, text):
    folder = whole()
    change_json(folder / "config.json", **changes)
    build_llava(llama_model=str(folder), ckpt=None)
    assert text in caplog.text
    assert bool(text) == ("answers may be worse" in caplog.text)


def test_adapters_without_projection_take_that_of_the_whole_llava_below(build_llava, whole, tmp_path):
    adapters = Path(shutil.copytree(FOLDER / "lora", tmp_path / "lora")) / "adapter_model.safetensors"
    adapters.with_name("non_lora_trainables.bin").unlink()
    tensors = load_file(adapters)
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}  # as in a module
    save_file(named, adapters)
    rules = {"llm": {"rule": "lora", "r": 4, "alpha": 8}, "projection": "full"}
    keys = {"llama_model": str(FOLDER / "stage2_linear"), "ckpt": str(adapters), "train": rules}
    with pytest.raises(WeightsError, match=r"(?s)missing: llama_proj.*no projection without non_lora_trainables\.bin"):
        build_llava(**keys)
    model = build_llava(**keys, ckpt_allow_keys=["llama_proj.*"])
    own = load_file(FOLDER / "stage2_linear" / "model.safetensors")
    assert torch.equal(model.llama_proj.weight, own["model.mm_projector.weight"])
    trained = model.trainable_parameters()
    for name, tensor in named.items():
        assert torch.equal(trained[f"llama_model.{name}"], tensor)


def test_missing_shard_is_named(build_llava, whole):
    folder = whole()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::2]}, folder / file, metadata={"format": "pt"})
    places = {name: files[number % 2] for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    build_llava(llama_model=str(folder), ckpt=None)
    (folder / files[1]).unlink()
    with pytest.raises(WeightsError, match=f"1 of 2 files of weights are missing, such as {files[1]}"):
        build_llava(llama_model=str(folder), ckpt=None)


# Chat


@pytest.fixture
def config_file(tmp_path, llava_section):
    """A YAML file to talk to the whole tiny LLaVA."""
    section = llava_section(model_type="v1", llama_model=str(FOLDER / "stage2_linear"), image_aspect_ratio="pad")
    path = tmp_path / "llava.yaml"
    path.write_text(
        yaml.safe_dump({"model": section | {"ckpt": None}, "datasets": {}, "run": {"task": "image_text_pretrain"}})
    )
    return path


def test_pipeline_talks_about_several_images_one_and_none(config_file, parity_dir):
    model = pipeline(config_file)
    images = [open_image(parity_dir / "images" / name) for name in ("img0_rgb_nonsquare.png", "img3_rgb.png")]
    assert (model.processor.image_size, model.processor.image_aspect_ratio) == (56, "pad")
    pixels = torch.stack([model.processor(image) for image in images])
    decoding = {"max_new_tokens": 8, "min_length": 8}
    for count in (2, 1, 0):
        chat = model.chat()
        for image in images[:count]:
            chat.show(image)
        shown = [pixels[:count] if count else None]
        prompt = model.model.prompting.template.opening + "USER: " + "<image>\n" * count + "Which? ASSISTANT:"
        answer = chat.ask("Which?", Decoding(**decoding))
        assert [answer] == model.model.generate(shown, [prompt], **decoding)
        prompt += f" {answer}</s>USER: Why? ASSISTANT:"
        assert [chat.ask("Why?", Decoding(**decoding))] == model.model.generate(shown, [prompt], **decoding)


def test_datasets_follow_the_model_where_they_name_no_processor(config_file):
    tree = yaml.safe_load(config_file.read_text())
    own = {"builder": "image_caption_json", "build_info": {"storage": "data"}}
    tree["datasets"] = {"mine": own | {"vis_processor": {"eval": {"name": "blip2_image_eval"}}}}
    config_file.write_text(yaml.safe_dump(tree))
    args = type("Arguments", (), {"cfg_path": str(config_file), "options": []})
    found = Config(args).validate(training=False).datasets["mine"].vis_processor
    assert (found.train.name, found.eval.name) == ("clip_image_train", "blip2_image_eval")
    assert found.train.arguments()["image_aspect_ratio"] == "pad"


def test_captions_take_llavas_placeholder(config_file, parity_dir):
    model, path = pipeline(config_file), parity_dir / "images" / "img0_rgb_nonsquare.png"
    asked = model.model.prompt_template.format(QUESTION)
    pixels = model.processor(open_image(path))[None]
    assert model.caption(path, QUESTION, max_new_tokens=8) == model.model.generate(pixels, [asked], max_new_tokens=8)[0]
    neutral = "<Img><ImageHere></Img> What is it?"
    assert model.caption(path, neutral, max_new_tokens=8) == model.caption(path, QUESTION, max_new_tokens=8)


def test_server_needs_no_checkpoint_beside_a_whole_llava(config_file):
    args = type("Arguments", (), {"cfg_path": str(config_file), "options": []})
    assert checkpoints(Config(args).validate(training=False), []) == ("stage2_linear", {})
