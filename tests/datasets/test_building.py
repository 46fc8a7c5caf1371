"""From sections to datasets, by the names and defaults that ship."""

from types import SimpleNamespace

import pytest

from minigpt4.common.binding import bind
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, RegistryError
from minigpt4.common.registry import registry
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets import ImageCaptionJsonBuilder, ImageCaptionShardsBuilder, build_datasets


def _shipped(name, folder):
    """The section of a published name with its defaults."""
    user = folder / "user.yaml"
    user.write_text(f"model: {{arch: minigpt4, model_type: pretrain_vicuna0}}\ndatasets: {{{name}: {{}}}}\nrun: {{}}\n")
    cfg = Config(SimpleNamespace(cfg_path=str(user), options=None))
    return bind(DatasetConfig, cfg.datasets_cfg[name], section=name, source="user.yaml")


def test_splits_that_a_dataset_lacks_are_left_out_and_others_have_processors_of_evaluation(files):
    annotations = str(files.json("a.json", [{"image_id": "a", "caption": "A."}]))
    shard, info = str(files.shard("s.tar", range(2))), {"ann_path": annotations, "image_path": str(files.images("a"))}
    sections = {
        "cats": files.section("image_caption_json", **info),
        "birds": files.section("image_caption_shards", storage=shard, val_storage=shard),
    }
    sections["birds"].text_processor.eval.kwargs["max_words"] = 1
    built = build_datasets(sections, ["train", "val"])
    assert {name: list(own) for name, own in built.items()} == {"cats": ["train"], "birds": ["train", "val"]}
    answers = {split: next(dataset.open(0, 1, None)).load()["answer"] for split, dataset in built["birds"].items()}
    assert answers == {"train": "a photo of 0", "val": "a"}
    with pytest.raises(ConfigError, match=r"no split 'test'; set build_info.test_ann_path"):
        build_datasets(sections, ["train", "test"])


def test_unknown_format_is_refused(files):
    section = files.section("image_caption_jsonl", storage="x")
    with pytest.raises(RegistryError, match="did you mean 'image_caption_json'"):
        build_datasets({"birds": section}, ["train"])


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        *((name, ImageCaptionShardsBuilder) for name in ("laion", "cc_sbu")),
        *((name, ImageCaptionJsonBuilder) for name in ("cc_sbu_align", "flickr30k_grounded_detail")),
    ],
)
def test_shipped_section_is_built_by_the_builder_of_its_name(name, builder, tmp_path):
    section = _shipped(name, tmp_path)
    assert registry.get_builder_class(section.builder) is registry.get_builder_class(name) is builder
    assert "train" in builder(name, section).splits()


def test_shipped_flickr_section_reads_what_the_preparation_writes(files, monkeypatch, tmp_path, tools):
    folder = tmp_path / "flickr30k"
    (folder / "flickr30k-images").mkdir(parents=True)
    for identity, ending in (("1", ""), ("2", "_val"), ("3", "_test")):
        (folder / "flickr30k-images" / f"{identity}.jpg").write_bytes(tools.picture())
        content = [{"image_id": identity, "grounded_caption": f"Caption {identity}."}]
        files.json(f"flickr30k/flickr30k_grounded_detail{ending}.json", content)
    monkeypatch.chdir(tmp_path)
    section = _shipped("flickr30k_grounded_detail", tmp_path)
    built = build_datasets({"flickr": section}, ["train", "val", "test"])["flickr"]
    answers = [next(dataset.open(0, 1, None)).load()["answer"] for dataset in built.values()]
    assert answers == ["Caption 1.", "Caption 2.", "Caption 3."]
