"""Code that was written against the published package: how it loads a model, shows images and asks about them."""

import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from minigpt4 import pipeline
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, WeightsError
from minigpt4.common.eval_utils import computeIoU, eval_parser, init_model, prepare_texts
from minigpt4.common.registry import registry
from minigpt4.conversation import chat as own
from minigpt4.conversation.conversation import (
    Chat,
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    StoppingCriteriaList,
    StoppingCriteriaSub,
)
from minigpt4.conversation.decoding import Decoding
from minigpt4.inference.engine import Engine
from minigpt4.models import *  # noqa: F403 - as they write it
from minigpt4.processors import *  # noqa: F403

GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 8}
PARITY = Path(__file__).parents[1] / "data" / "parity"
GOLDEN = json.loads((PARITY / "golden.json").read_text())["chat"]
FILES = sorted((PARITY / "images").glob("img*.png"))
TEMPLATES = {"vicuna0": CONV_VISION_Vicuna0, "llama2": CONV_VISION_LLama2}
QUESTIONS = ("What is the weather like in this picture?", "Are there any people, and what are they doing?")
FIRST_ANSWER = "It is a sunny day with a few clouds."
PROCESSOR = {"vis_processor": {"train": {"name": "blip2_image_eval", "image_size": 56}}}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def args(tiny_section, write_recipe, tmp_path_factory):
    """The published command line of a tiny model."""
    model = tiny_section(arch="minigpt4", model_type="pretrain_vicuna0", end_sym="###")
    path = write_recipe(tmp_path_factory.mktemp("published"), model, {"cc_sbu_align": PROCESSOR})
    return Namespace(cfg_path=str(path), options=None, gpu_id=0)


@pytest.fixture(scope="module")
def loaded(args):
    """Model and image processor, loaded the published way."""
    cfg = Config(args)
    model_config = cfg.model_cfg
    model_config.device_8bit = args.gpu_id
    model_cls = registry.get_model_class(model_config.arch)
    model = model_cls.from_config(model_config).to("cpu")
    model.eval()
    vis_processor_cfg = cfg.datasets_cfg.cc_sbu_align.vis_processor.train
    return model, registry.get_processor_class(vis_processor_cfg.name).from_config(vis_processor_cfg)


@pytest.fixture
def chat(loaded):
    return Chat(*loaded, device="cuda:0")


@pytest.fixture
def shown(chat):
    """A conversation in which an image was shown, and its embeddings."""
    conv, img_list = CONV_VISION_Vicuna0.copy(), []
    assert chat.upload_img(str(FILES[0]), conv, img_list) == "Received."
    chat.encode_img(img_list)
    return conv, img_list


# The published way gives the answers of `conversation.chat.Chat`


def test_answers_about_one_and_two_images_are_those_of_our_chat_with_beams_too(loaded, chat, shown):
    ours, (conv, img_list) = own.Chat(Engine(*loaded)), shown
    ours.show(Image.open(FILES[0]))
    for file, text, beams in [(None, "What is this?", 1), (FILES[1], "Is this alike?", 1), (None, "Why?", 3)]:
        if file is not None:
            ours.show(Image.open(file))
            chat.upload_img(file, conv, img_list)
            chat.encode_img(img_list)
        chat.ask(text, conv)
        how = {"num_beams": beams, "temperature": 1.0, "max_length": 2000}
        said, _ = chat.answer(conv=conv, img_list=img_list, **GREEDY | how)
        assert said
        assert said == ours.ask(text, Decoding(num_beams=beams, max_new_tokens=8))
    assert conv.messages == ours.conversation.messages
    assert CONV_VISION_Vicuna0.messages == []


def test_images_may_be_paths_pictures_or_pixels_and_stay_where_they_are_embedded(loaded, chat):
    pixels = loaded[1](Image.open(FILES[0]))
    img_list = []
    for image in (str(FILES[0]), Image.open(FILES[0]), pixels, pixels[None]):
        chat.upload_img(image, CONV_VISION_Vicuna0.copy(), img_list)
    chat.encode_img(img_list)
    before = list(img_list)
    chat.encode_img(img_list)
    assert all(old is new for old, new in zip(before, img_list, strict=True))
    assert [tuple(embeds.shape) for embeds in img_list] == [(1, 8, 96)] * 4
    assert all(torch.equal(embeds, img_list[0]) for embeds in img_list)


def test_stream_is_the_answer_in_pieces_and_leaves_the_conversation_to_the_caller(chat, shown):
    conv, img_list = shown
    chat.ask("What is this?", conv)
    other = conv.copy()
    streamer = chat.stream_answer(conv=conv, img_list=img_list, **GREEDY)
    assert conv.messages[-1] == ["Assistant: ", None]
    pieces = list(streamer)
    assert len(pieces) > 1
    assert "".join(pieces) == chat.answer(other, img_list, **GREEDY)[0]


def test_text_with_places_of_its_own_is_asked_as_it_is(loaded, chat, shown):
    conv = CONV_VISION_minigptv2.copy()
    chat.ask("<Img><ImageHere></Img> What is this?", conv)
    context = chat.get_context_emb(conv, shown[1])
    assert torch.equal(context, loaded[0].get_context_emb("<s>[INST] <Img><ImageHere></Img> What is this?", shown[1]))


# The published code's own numbers


@pytest.fixture(params=["vicuna0", "llama2"])
def published(request, shared_model):
    """A conversation in its second turn, its images, and what the published code made of them."""
    expected = GOLDEN[request.param]
    model = shared_model(has_qformer=expected["has_qformer"])
    chat = Chat(model, registry.get_processor_class("blip2_image_eval")(image_size=56))
    conv, img_list = TEMPLATES[request.param].copy(), []
    assert chat.upload_img(str(PARITY / expected["image"]), conv, img_list) == expected["upload_msg"]
    chat.encode_img(img_list)
    chat.ask(QUESTIONS[0], conv)
    conv.append_message(conv.roles[1], FIRST_ANSWER)
    chat.ask(QUESTIONS[1], conv)
    return chat, conv, img_list, expected


@pytest.mark.parametrize("kind", ["answer", "answer_stop1", "answer_stop2"])
def test_answer_and_ids_are_those_of_the_published_chat(published, kind):
    chat, conv, img_list, expected = published
    stops = [expected[kind]["stop_ids"]] if kind != "answer" else expected["stop_ids"]
    criteria = StoppingCriteriaSub(stops=[torch.tensor(ids) for ids in stops], encounters=1)
    chat.stopping_criteria = StoppingCriteriaList([criteria])
    text, ids = chat.answer(conv, img_list, **expected["answer"]["kwargs"])
    assert (text, ids.tolist()) == (expected[kind]["text"], expected[kind]["ids"])
    assert conv.messages[-1] == [conv.roles[1], text]


def test_what_is_prepared_is_what_the_published_chat_prepares(published, golden_tensors):
    chat, conv, img_list, expected = published
    prepared = chat.answer_prepare(conv.copy(), img_list, max_new_tokens=30)
    assert {key: prepared[key] for key in expected["default_kwargs"]} == expected["default_kwargs"]
    cut = expected["left_cut"]
    assert prepared["inputs_embeds"].shape[1] == cut["full"]
    prepared = chat.answer_prepare(conv, img_list, max_new_tokens=cut["max_new_tokens"], max_length=cut["max_length"])
    assert conv.get_prompt() == expected["prompt_turn2"]
    name = "vicuna0" if conv.sep else "llama2"
    wanted = golden_tensors[f"chat/{name}/embs_turn2_left_cut"]
    torch.testing.assert_close(prepared["inputs_embeds"].detach(), wanted, atol=1e-5, rtol=0)


def test_criterion_looks_at_each_output_by_itself():
    criterion = StoppingCriteriaSub(stops=[torch.tensor([5, 6]), torch.tensor([7] * 9)])
    outputs = torch.tensor([[1, 5, 6], [5, 6, 1]])
    assert criterion(outputs, None).tolist() == [True, False]
    assert StoppingCriteriaList([criterion])(outputs, None).tolist() == [True, False]


def test_criterion_of_somebody_else_ends_an_answer(chat):
    conv = CONV_VISION_Vicuna0.copy()
    chat.stopping_criteria = [lambda ids, scores, **kwargs: ids.shape[1] == 4]
    chat.ask("Hello?", conv)
    assert len(chat.answer(conv, [], **GREEDY)[1]) == 4


# VLMEvalKit: its adapter reads the YAML file itself and hands `model:` to the class as it stands


@pytest.fixture(scope="module")
def vlmevalkit(tiny_section, write_recipe, tmp_path_factory):
    """The published 7B evaluation file with tiny weights."""
    own = {key: value for key, value in tiny_section().items() if key not in ("llm_precision", "truncate_end_sym")}
    model = {"arch": "minigpt4", "model_type": "pretrain_vicuna_7b", "max_txt_len": 160, "end_sym": "###"} | own
    model |= {"low_resource": False, "prompt_template": "###Human: {} ###Assistant: ", "prompt": ""}
    model |= {"drop_path_rate": 0, "use_grad_checkpoint": False, "freeze_vit": True, "freeze_qformer": True}
    processors = PROCESSOR | {"text_processor": {"train": {"name": "blip_caption"}}}
    path = write_recipe(tmp_path_factory.mktemp("vlmevalkit"), model, {"cc_sbu_align": processors})
    cfg = OmegaConf.load(path)
    cfg.model.device_8bit = 0
    loaded = registry.get_model_class(cfg.model.arch).from_config(cfg.model).to("cpu").eval()
    section = cfg.datasets.cc_sbu_align.vis_processor.train
    processor = registry.get_processor_class(section.name).from_config(section)
    stops = StoppingCriteriaSub(stops=[torch.tensor(ids) for ids in ([835], [2277, 29937])])
    return path, Chat(loaded, processor, device=0, stopping_criteria=StoppingCriteriaList([stops]))


def asked_by_vlmevalkit(chat, file, question):
    conv, img_list = CONV_VISION_Vicuna0.copy(), []
    chat.upload_img(str(file), conv, img_list)
    chat.encode_img(img_list)
    chat.ask(question, conv)
    return conv, img_list


@pytest.mark.parametrize("beams", [1, 5])
def test_vlmevalkit_gets_the_answers_of_our_pipeline(vlmevalkit, beams):
    path, chat = vlmevalkit
    known = path.with_name("published.yaml")  # that name is VLMEvalKit's own
    known.write_text(path.read_text().replace("pretrain_vicuna_7b", "pretrain_vicuna0"))
    ours, how = pipeline(known).chat(), {"num_beams": beams, "length_penalty": -1 if beams > 1 else 1.0}
    ours.show(Image.open(FILES[0]))
    conv, img_list = asked_by_vlmevalkit(chat, FILES[0], "What is this?")
    with torch.inference_mode():
        asked = {"max_new_tokens": 12, "min_length": 1, "top_p": 0.9, "repetition_penalty": 1.0, "temperature": 1.0}
        prepared = chat.answer_prepare(conv, img_list, **asked, **how, max_length=2000)
        prepared["do_sample"] = False
        ids = chat.model_generate(**prepared)[0]
    said = chat.model.llama_tokenizer.decode(ids, skip_special_tokens=True)
    said = said.split("###")[0].split("Assistant:")[-1].strip()
    assert said
    assert said == ours.ask("What is this?", Decoding(max_new_tokens=12, **how))


def test_vlmevalkit_of_today_takes_the_published_answer(vlmevalkit):
    conv, img_list = asked_by_vlmevalkit(vlmevalkit[1], FILES[0], "What is this?")
    with torch.inference_mode():
        said = vlmevalkit[1].answer(conv=conv, img_list=img_list)[0]
    assert said
    assert conv.messages[-1] == ["Assistant: ", said]


# Evaluation scripts


def test_evaluation_script_loads_prepares_and_generates(args, loaded):
    argv = ["--cfg-path", args.cfg_path, "--name", "tiny", "--eval_opt", "all", "--batch_size", "2"]
    given = eval_parser().parse_args([*argv, "--options", "model.max_txt_len=32"])
    model, processor = init_model(given)
    assert (model.max_txt_len, given.max_new_tokens, given.batch_size) == (32, 10, 2)
    images = torch.stack([processor(Image.open(file)) for file in FILES[:2]])
    texts = prepare_texts(["What is this?", "Why?"], CONV_VISION_Vicuna0.copy())
    system = CONV_VISION_Vicuna0.system
    assert texts[1] == f"{system}###Human: <Img><ImageHere></Img> Why?###Assistant: "
    answers = model.generate(images, texts, max_new_tokens=given.max_new_tokens, do_sample=False)
    assert answers == loaded[0].generate(images, texts, max_new_tokens=10)
    given = eval_parser().parse_args([*argv, "--ckpt", "other.pth"])  # goes over that of the file
    with pytest.raises((ConfigError, WeightsError), match=r"other\.pth"):
        init_model(given)


def test_boxes_overlap_by_whole_pixels():
    assert computeIoU([0, 0, 9, 9], [0, 0, 9, 9]) == 1
    assert computeIoU([0, 0, 9, 9], [5, 0, 14, 9]) == 50 / 150
    assert computeIoU([0, 0, 9, 9], [20, 20, 30, 30]) == 0


# Names that they import, but for those that this file and tests/common/test_published_names.py import

NAMES = """
conversation.conversation Conversation SeparatorStyle
datasets.builders BaseDatasetBuilder
datasets.builders.base_dataset_builder BaseDatasetBuilder
datasets.data_utils prepare_sample
datasets.datasets.base_dataset BaseDataset
models.base_model BaseModel disabled_train
models.eva_vit
models.mini_gpt4 MiniGPT4
processors
processors.base_processor BaseProcessor
processors.blip_processors Blip2ImageEvalProcessor Blip2ImageTrainProcessor BlipCaptionProcessor
tasks.image_text_pretrain ImageTextPretrainTask
"""


def test_published_names_import():
    for line in NAMES.strip().splitlines():
        module, *names = line.split()
        found = importlib.import_module(f"minigpt4.{module}")
        assert [name for name in names if not hasattr(found, name)] == [], module
    for package in ("datasets.builders", "models", "processors", "runners", "tasks"):
        exec(f"from minigpt4.{package} import *", {})
