"""The Python API on tiny weights, and what it loads from: YAML files and folders of runs."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

import minigpt4
from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, SampleError, WeightsError
from minigpt4.common.run_folder import RunFolder
from minigpt4.conversation.chat import Chat, Decoding
from minigpt4.inference.pipeline import Pipeline, pipeline, read_source
from minigpt4.processors import open_image

WHOLE = "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "


def _generated(model: Pipeline, file: Path, prompt: str = WHOLE, **decoding) -> str:
    pixels = model.processor(open_image(file))[None]
    return model.model.generate(pixels, [prompt], **({"max_new_tokens": 6} | decoding), stop=["###"])[0]


# Captions


def test_caption_is_what_the_model_generates_and_the_call_goes_over_the_configuration(tiny, files):
    assert tiny.caption(files[0]) == tiny.caption(str(files[0])) == _generated(tiny, files[0])
    assert tiny.caption(files[0]) == tiny.caption(Image.open(files[0]))
    said = tiny.caption(files[0], "<ImageHere> Where?", max_new_tokens=9, num_beams=3)
    prompt = "###Human: <ImageHere> Where? ###Assistant: "
    assert said == _generated(tiny, files[0], prompt, max_new_tokens=9, num_beams=3)
    assert said != tiny.caption(files[0])


def test_several_images_have_a_list_in_their_order_whatever_the_batch(tiny, files):
    alone = [tiny.caption(file) for file in files]
    assert len(set(alone)) > 1
    assert tiny.caption(files) == tiny.caption(files, batch_size=2) == alone
    assert tiny.caption([files[0]]) == alone[:1]
    assert tiny.caption([]) == []


def test_pipeline_on_a_timm_tower_takes_the_towers_image_size(write_config, files, tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "vit.pth")
    tower = {"vit_model": "resnet10t", "vit_config": {}, "vit_weights": str(tmp_path / "vit.pth"), "image_size": None}
    model = pipeline(write_config(tmp_path, **tower, has_qformer=False, ckpt=None), device="cpu")
    assert model.processor(open_image(files[0])).shape == (3, 176, 176)
    assert model.model.generate(model.processor(open_image(files[0]))[None], [WHOLE], max_new_tokens=2)


def test_sampling_repeats_with_the_seed_of_the_caller(tiny, files):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(tiny.caption(files, do_sample=True, temperature=3.0))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_beam": 3}, "decoding.num_beam: .*did you mean 'num_beams'"),
        ({"num_beams": 0}, "num_beams: 0 must be at least 1"),
        ({"num_beams": "many"}, "decoding.num_beams"),
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"prompt": "What is this?"}, r"'What is this\?' must hold <ImageHere> exactly once"),
    ],
)
def test_wrong_prompt_or_decoding_is_refused_by_name(tiny, files, change, complaint):
    with pytest.raises(ConfigError, match=rf"(?s)caption\(\):.*{complaint}"):
        tiny.caption(files[0], **change)


def test_image_that_cannot_be_read_is_named(tiny, files, parity_dir, tmp_path):
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:-2000])
    for images, complaint in (
        ([files[0], "nothing.png"], "nothing.png: cannot be opened"),
        (parity_dir / "golden.json", "golden.json: not an image"),
        ([*files[:2], 7], r"images\[2\]: must be a PIL image or a path, not int"),
        ([files[0], Image.open(tmp_path / "cut.png")], r"images\[1\]: the image is damaged or cut off"),
    ):
        with pytest.raises(SampleError, match=complaint):
            tiny.caption(images, batch_size=2)


# Chat


def test_chat_goes_on_with_its_checkpoint_whatever_is_used_since(tiny, files, other_checkpoint):
    start, captions, frozen = tiny.checkpoint, tiny.caption(files), tiny.model.llama_model
    first, chat = tiny.chat(), tiny.chat()
    said = _asked(first, files)
    assert first.conversation.messages[1][1] == said
    assert (chat.pictures, chat.conversation.messages) == ([], [])
    tiny.use_checkpoint(other_checkpoint)
    assert tiny.checkpoint == other_checkpoint
    others = tiny.caption(files)
    assert _asked(chat, files) == said != _asked(tiny.chat(), files)
    assert tiny.caption(files) == others != captions
    tiny.use_checkpoint(start)
    assert tiny.caption(files) == captions
    assert _asked(tiny.chat(), files) == said
    assert tiny.model.llama_model is frozen


def _asked(chat: Chat, files: list[Path]) -> str:
    chat.show(open_image(files[0]))
    return chat.ask("What is this?", Decoding(max_new_tokens=12))


# Checkpoints


def test_checkpoint_that_does_not_fit_leaves_the_one_before(tiny, files, parity_dir):
    start, before = tiny.checkpoint, tiny.caption(files)
    for wrong in (parity_dir / "eva_vit_tiny.pth", "nothing.pth"):
        with pytest.raises(WeightsError, match=Path(wrong).name):
            tiny.use_checkpoint(wrong)
    assert (tiny.checkpoint, tiny.caption(files)) == (start, before)


def test_without_a_checkpoint_nothing_is_answered_until_there_is_one(config, tiny, files, other_checkpoint):
    model = pipeline(config, ["model.ckpt=null"], "cpu")
    for ask in (model.chat, lambda: model.caption(files[0])):
        with pytest.raises(WeightsError, match=r"model\.ckpt is not set.*use_checkpoint"):
            ask()
    model.use_checkpoint(tiny.checkpoint)
    assert model.caption(files[0]) == tiny.caption(files[0])


# Loading


def test_missing_weights_and_unknown_devices_and_names_are_named_before_anything_loads(config):
    with pytest.raises(ConfigError, match=r"model\.ckpt: nothing\.pth does not exist"):
        minigpt4.pipeline(config, ["model.ckpt=nothing.pth"])
    with pytest.raises(ConfigError, match="device: 'gpu' must be cuda"):
        minigpt4.pipeline(config, device="gpu")
    with pytest.raises(AttributeError, match="no attribute 'pipelines'"):
        minigpt4.pipelines  # noqa: B018


# YAML files and folders of runs


@pytest.fixture
def run(tmp_path, config):
    """The folder of a run with two checkpoints."""
    folder = RunFolder.create(tmp_path / "runs")
    folder.describe(read_source(config, ["model.ckpt=start.pth"]).merged, seed=42, world_size=1)
    for iteration in (5, 10):
        _save(folder.path / f"checkpoint_{iteration}.pth", iteration)
    return folder.path


def _save(path, iteration):
    save_checkpoint(path, {"model": {"w": torch.zeros(9)}}, {"iteration": iteration, "run_started": "2026-01-01"})


def test_run_gives_its_configuration_with_its_best_checkpoint_or_else_its_newest_unless_an_option_names_one(
    run, config, caplog
):
    with caplog.at_level(logging.INFO):
        found = read_source(run, ["run.seed=7"])
    assert (found.model.ckpt, found.run.seed) == (str(run / "checkpoint_10.pth"), 7)
    assert found.model.prompt_template == read_source(config).model.prompt_template
    assert "taking its checkpoint checkpoint_10.pth" in caplog.text
    best = run / "checkpoint_best.pth"
    _save(best, 5)
    assert read_source(run).model.ckpt == str(best)
    best.write_bytes(b"half")
    assert read_source(run).model.ckpt == str(run / "checkpoint_10.pth")
    assert read_source(run, ["model.ckpt=other.pth"]).model.ckpt == "other.pth"
    expected = read_source(config, ["model.ckpt=start.pth"]).merged  # commands take the run.json
    assert Config(SimpleNamespace(cfg_path=str(run / "run.json"), options=None)).to_dict() == expected
    for file in run.glob("*.pth"):
        file.write_bytes(b"half")
    with pytest.raises(WeightsError, match=f"{run}: the run has no whole checkpoint"):
        read_source(run)


def test_source_that_is_no_run_and_no_yaml_says_what_it_should_be(run, tmp_path):
    for source, complaint in (
        (run.parent, rf"{run.parent}: is not the folder of a run.*the last of the 1 runs.*{run}"),
        (tmp_path, r"is not the folder of a run, for it has no run\.json$"),
        (tmp_path / "nothing.yaml", "nothing.yaml: no such file"),
        (run / "checkpoint_5.pth", r"checkpoint_5\.pth: is a weights file; name its YAML"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            read_source(source)
    for content in ('{"seed": 42}', "{"):
        (run / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"run\.json"):
            read_source(run)
