"""A dataset's section: formats and the paths they need, processors with further arguments."""

import pytest

from minigpt4.common.binding import bind, missing_paths
from minigpt4.common.errors import ConfigError
from minigpt4.common.schemas import DatasetConfig

SHARDS = {"builder": "image_caption_shards", "build_info": {"storage": "x/{0..3}.tar"}}
PAIR = {"builder": "image_caption_json", "build_info": {"ann_path": "a.json", "image_path": "images"}}


def _bind(**values) -> DatasetConfig:
    return bind(DatasetConfig, values, section="datasets.birds", source="user.yaml")


def test_processors_default_to_the_published_ones():
    config = _bind(**SHARDS)
    assert config.vis_processor.train.name == "blip2_image_train"
    assert config.vis_processor.eval.name == "blip2_image_eval"
    assert config.text_processor.train.name == "blip_caption"
    assert config.text_processor.eval.arguments() == {}


def test_further_keys_of_a_processor_become_its_arguments():
    vision = {"train": {"name": "blip2_image_train", "image_size": 448, "min_scale": 0.5}}
    text = {"train": {"name": "blip_caption", "max_words": 7}}
    config = _bind(**SHARDS, vis_processor=vision, text_processor=text)
    assert config.vis_processor.train.arguments() == {"image_size": 448, "min_scale": 0.5}
    assert config.text_processor.train.arguments() == {"max_words": 7}


@pytest.mark.parametrize("good", [SHARDS, PAIR, {**PAIR, "build_info": {"storage": "cc_sbu_align"}}])
def test_either_way_to_name_the_data_is_accepted(good):
    assert _bind(**good).builder == good["builder"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "datasets.birds.builder: is missing"),
        ({"builder": "image_caption_shards"}, "datasets.birds.build_info.storage: is missing"),
        ({"builder": "image_caption_json"}, "datasets.birds.build_info.ann_path: is missing"),
        (
            {"builder": "image_caption_json", "build_info": {"ann_path": "a"}},
            "datasets.birds.build_info.image_path: is missing",
        ),
        (
            {
                "builder": "image_caption_json",
                "build_info": {"ann_path": "a", "image_path": "b", "storage": "c"},
            },
            "datasets.birds.build_info.storage: cannot stand beside",
        ),
        (
            {"builder": "image_caption_shards", "build_info": {"storage": "/path/to/{0..3}.tar"}},
            "datasets.birds.build_info.storage: '/path/to/{0..3}.tar' is a placeholder",
        ),
        (
            {
                **SHARDS,
                "build_info": {"storage": "x", "annotations": {"train": {}}, "images": {"storage": "i"}},
            },
            "datasets.birds.build_info.images: LAVIS's nested form is not read; set image_path",
        ),
        ({**SHARDS, "batch_size": 0}, "datasets.birds.batch_size: 0 must be at least 1"),
        ({**SHARDS, "sample_ratio": 0}, "datasets.birds.sample_ratio: 0.0 must be above 0"),
        ({**SHARDS, "data_type": "videos"}, "datasets.birds.data_type: 'videos' must be one of images"),
        ({**SHARDS, "sample_ration": 2}, "did you mean 'sample_ratio'?"),
        (
            {**SHARDS, "vis_processor": {"trian": {"name": "x"}}},
            "datasets.birds.vis_processor.trian: unknown key; did you mean 'train'?",
        ),
        (
            {**SHARDS, "vis_processor": {"train": {"name": "x", "image_size": 0}}},
            "datasets.birds.vis_processor.train.image_size: 0 must be at least 1",
        ),
    ],
)
def test_faulty_section_is_refused(values, complaint):
    with pytest.raises(ConfigError) as error:
        _bind(**values)
    assert complaint in str(error.value)


def test_missing_data_is_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert missing_paths({"datasets.birds": _bind(**PAIR)}) == [
        ("datasets.birds.build_info.ann_path", "a.json"),
        ("datasets.birds.build_info.image_path", "images"),
    ]
