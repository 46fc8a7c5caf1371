"""Sections bound together: what a whole configuration must agree on."""

import logging
from types import SimpleNamespace

import pytest

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.datasets import builder_of
from minigpt4.evaluation.command import for_evaluation, without_datasets
from minigpt4.evaluation.generate import batch_size
from minigpt4.inference.pipeline import image_processor, image_provenance

MODEL = "model: {arch: minigpt4, model_type: pretrain_vicuna0}\n"
RUN = "run: {init_lr: 1e-4, max_epoch: 1, iters_per_epoch: 2}\n"
DATASETS = "datasets: {laion: {batch_size: 3}, cc_sbu: {}}\n"
SMALL_IMAGES = "{batch_size: 2, vis_processor: {train: {name: blip2_image_train, image_size: 112}}}"

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def tower(name: str) -> str:
    return MODEL.replace("}", f", vit_model: {name}}}")


def normalisation(config) -> set[tuple]:
    """Mean and std of everything that images go through: training, validation, captions, evaluations, page, server."""
    data = [builder_of(name, section) for name, section in config.datasets.items()]
    processors = [builder.vis_processor(split) for builder in data for split in ("train", "val", "test")]
    commands = [config, without_datasets(config), for_evaluation(config)] if data else [config]
    processors += [image_processor(own) for own in commands]
    return {(one.mean, one.std) for one in processors}


@pytest.fixture
def read(tmp_path):
    def read_text(text: str, training: bool = False):
        file = tmp_path / "user.yaml"
        file.write_text(text)
        return Config(SimpleNamespace(cfg_path=str(file), options=None)).validate(training=training)

    return read_text


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (MODEL + DATASETS + RUN, ["run.batch_size_train"]),
        (MODEL + "datasets: {}\nrun: {init_lr: 1e-4}\n", ["run.max_epoch", "run.iters_per_epoch", "datasets"]),
        (MODEL + "datasets: {cc_sbu_align: {}}\nrun: {evaluate: True}\n", ["run.test_splits"]),
        (
            MODEL + f"datasets: {{laion: {SMALL_IMAGES}, cc_sbu: {SMALL_IMAGES}}}\n" + RUN,
            ["datasets.laion.vis_processor.train.image_size", "datasets.cc_sbu.vis_processor.train.image_size"],
        ),
        (
            MODEL.replace("}", ", low_resource: True}")
            + "datasets: {cc_sbu_align: {batch_size: 1}}\n"
            + RUN.replace("2}", "2, parallel: fsdp}"),
            ["run.parallel"],
        ),
        (
            MODEL.replace("}", ", llama_modle: x, ckpt: /path/to/x}")
            + "datasets: {cc_sbu_align: {batch_size: 0, build_info: {storage: <x>}, type_: 3}}\n"
            + "run: {init_lr: 1e-4, min_lr: 1, iters_per_epoch: many, max_iters: 4}\n",
            [
                "run.max_iters",
                "run.iters_per_epoch",
                "datasets.cc_sbu_align.type_",
                "datasets.cc_sbu_align.batch_size",
                "datasets.cc_sbu_align.build_info.storage",
                "model.ckpt",
                "model.llama_modle",
            ],
        ),
    ],
)
def test_all_faults_of_a_configuration_are_told_at_once(read, text, keys):
    with pytest.raises(ConfigError) as error:
        read(text, training=True)
    source, *faults = str(error.value).splitlines()
    assert source.endswith("user.yaml:")
    assert [fault.removeprefix("  - ").partition(":")[0] for fault in faults] == keys


def test_names_of_the_published_llava_come_with_those_here(read):
    model = "mm_vision_tower: a/b, mm_projector_type: linear, version: v1, mm_patch_merge_type: spatial_unpad"
    with pytest.raises(ConfigError) as error:
        read(f"model: {{arch: llava, model_type: v1, {model}}}\ndatasets: {{}}\nrun: {{learning_rate: 2e-5}}\n")
    for name, own in (
        ("mm_vision_tower", "vit_model"),
        ("mm_projector_type", "projection"),
        ("version", "conv_template"),
    ):
        assert f"model.{name}: it is called {own} here" in str(error.value)
    assert "model.mm_patch_merge_type: is of LLaVA 1.6" in str(error.value)
    assert "run.learning_rate: it is called init_lr here" in str(error.value)


def test_batch_size_is_the_largest_of_the_datasets_and_the_runs_for_those_without(read):
    assert read(MODEL + DATASETS + RUN.replace("2}", "2, batch_size_train: 5}")).batch_size() == 5
    assert batch_size(read(MODEL + "datasets: {}\nrun: {}\n")) == 8  # of a model to talk to, in an evaluation


# Mean and std of images


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("eva_clip_g", CLIP),
        ("resnet50", IMAGENET),
        ("vit_tiny_patch16_224", HALF),
        ("vit_base_patch16_224.dino", IMAGENET),
    ],
)
@pytest.mark.parametrize("datasets", ["{}", "{cc_sbu_align: {}}"])
def test_images_are_normalised_as_in_the_training_of_the_tower(read, name, own, datasets):
    run = RUN.replace("{", "{valid_splits: [val], ") if datasets == "{cc_sbu_align: {}}" else RUN
    config = read(tower(name) + f"datasets: {datasets}\n" + run)
    assert normalisation(config) == {own}


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", ["eva_clip_g", "resnet50"])
def test_mean_and_std_that_are_not_the_towers_are_an_error(read, name, split):
    section = f"{{name: blip2_image_{split}, mean: [0.1, 0.2, 0.3], std: [1, 1, 1]}}"
    both = f"{{vis_processor: {{{split}: {section}}}}}"
    with pytest.raises(ConfigError, match=rf"datasets\.laion\.vis_processor\.train\.mean: .*{name}.*leave it out"):
        read(tower(name) + f"datasets: {{laion: {both}, cc_sbu: {both}}}\n" + RUN)


def test_answers_are_kept_apart_by_what_was_done_to_the_images(read):
    made = [
        image_provenance(read(tower(name) + "datasets: {laion: {}}\n" + RUN))
        for name in ("eva_clip_g", "resnet50", "vit_tiny_patch16_224")
    ]
    assert made[0] == {}  # as before there were others
    assert len({str(own) for own in made}) == 3


def test_image_size_follows_the_model(read):
    config = read(MODEL.replace("}", ", image_size: 336}") + "datasets: {cc_sbu_align: {}}\n" + RUN)
    assert config.datasets["cc_sbu_align"].vis_processor.train.image_size == config.image_processor.image_size == 336
    config = read(tower("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k") + "datasets: {cc_sbu_align: {}}\n" + RUN)
    assert config.model.image_size == config.image_processor.image_size == 384


def test_name_of_a_tower_that_was_trained_in_several_ways_is_told_to_be_one_of_them(read, caplog):
    section = "{vis_processor: {train: {name: blip2_image_train, mean: [0.485, 0.456, 0.406]}}}"
    assert normalisation(read(tower("resnet50") + f"datasets: {{laion: {section}}}\n" + RUN)) == {IMAGENET}
    assert [record for record in caplog.records if record.levelno == logging.WARNING] == []
    assert normalisation(read(tower("vit_base_patch16_224") + "datasets: {laion: {}}\n" + RUN)) == {HALF}
    assert "vit_base_patch16_224.dino" in caplog.text


def test_tower_whose_statistics_nobody_knows_needs_them(read, monkeypatch):
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda name: None)
    with pytest.raises(ConfigError, match=r"datasets\.laion\.vis_processor\.train\.mean: .*set mean"):
        read(tower("resnet50") + "datasets: {laion: {}}\n" + RUN)
    section = "{vis_processor: {train: {name: blip2_image_train, mean: [0, 0, 0], std: [1, 1, 1]}}}"
    config = read(tower("resnet50") + f"datasets: {{laion: {section}}}\n" + RUN)
    assert normalisation(config) == {((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("resnet_50", "near: .*resnet"), ("resnet50.nope", r"no variant that timm knows: resnet50\.a1")],
)
def test_tower_that_timm_does_not_know_is_named_with_those_that_it_knows(read, name, reason):
    with pytest.raises(ConfigError, match=rf"model\.vit_model: '{name}'.*{reason}"):
        read(tower(name) + "datasets: {laion: {}}\n" + RUN)


def test_processor_without_mean_and_std_is_left_alone(read, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_processor.py").write_text(
        "from dataclasses import dataclass\n"
        "from minigpt4.common.registry import registry\n"
        "from minigpt4.processors import BaseProcessor\n"
        "@registry.register_processor('own_processor')\n"
        "@dataclass\n"
        "class OwnProcessor(BaseProcessor):\n"
        "    image_size: int = 224\n"
        "    def __call__(self, item): return item\n"
    )
    sections = "{vis_processor: {train: {name: own_processor}, eval: {name: own_processor}}}"
    config = read("imports: [own_processor]\n" + tower("resnet50") + f"datasets: {{laion: {sections}}}\n" + RUN)
    assert type(image_processor(config)).__name__ == "OwnProcessor"
