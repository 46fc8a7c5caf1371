"""From sections to datasets, by the names and defaults that ship."""

import pickle
from types import SimpleNamespace

import pytest

from minigpt4.common.binding import bind
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, RegistryError
from minigpt4.common.registry import registry
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets import BaseDatasetBuilder, build_datasets


def test_splits_that_a_dataset_lacks_are_left_out(files):
    info = {"ann_path": str(files.json("a.json", [{"image_id": "a", "caption": "A."}]))}
    images = str(files.images("a"))
    sections = {
        "cats": files.section("image_caption_json", image_path=images, val_ann_path=info["ann_path"], **info),
        "birds": files.section("image_caption_shards", storage=str(files.shard("s.tar", range(2)))),
    }
    built = build_datasets(sections, ["train", "val"])
    assert {name: list(own) for name, own in built.items()} == {"cats": ["train", "val"], "birds": ["train"]}
    with pytest.raises(ConfigError, match=r"no split 'test'; set build_info.test_ann_path"):
        build_datasets(sections, ["train", "test"])


def test_processors_of_evaluation_serve_the_other_splits(files):
    shard = str(files.shard("s.tar", range(2)))
    section = files.section("image_caption_shards", storage=shard, val_storage=shard)
    section.text_processor.eval.kwargs["max_words"] = 1
    built = build_datasets({"birds": section}, ["train", "val"])["birds"]
    answers = {split: next(dataset.open(0, 1, None)).load()["answer"] for split, dataset in built.items()}
    assert answers == {"train": "a photo of 0", "val": "a"}


@pytest.mark.parametrize("kind", ["records", "shards"])
def test_dataset_can_be_sent_to_another_process(kind, files, tools):
    dataset = files.records(3) if kind == "records" else files.shards([3])
    sent = pickle.loads(pickle.dumps(dataset))
    first, second = (next(d.open(0, 1, None)).load() for d in (dataset, sent))
    assert tools.same(first, second)


def test_two_ways_to_name_a_split_do_not_stand_together(files):
    with pytest.raises(ConfigError, match="build_info.split_field: cannot stand beside val_ann_path"):
        files.section("image_caption_json", ann_path="a", image_path="b", val_ann_path="c", split_field="part")


def test_unknown_format_is_refused_with_the_known_ones(files):
    section = files.section("image_caption_jsonl", storage="x")
    with pytest.raises(RegistryError, match="did you mean 'image_caption_json'"):
        build_datasets({"birds": section}, ["train"])


@pytest.mark.parametrize("name", ["laion", "cc_sbu", "cc_sbu_align", "flickr30k_grounded_detail"])
def test_shipped_section_is_built_by_the_builder_of_its_name(name, tmp_path):
    user = tmp_path / "user.yaml"
    user.write_text(f"model: {{arch: minigpt4, model_type: pretrain_vicuna0}}\ndatasets: {{{name}: {{}}}}\nrun: {{}}\n")
    cfg = Config(SimpleNamespace(cfg_path=str(user), options=None))
    section = bind(DatasetConfig, cfg.datasets_cfg[name], section=name, source="user.yaml")
    builder = registry.get_builder_class(name)
    assert registry.get_builder_class(section.builder) is builder
    assert issubclass(builder, BaseDatasetBuilder)
    assert "train" in builder(name, section).splits()


def test_shipped_flickr_section_reads_what_the_preparation_writes(files, monkeypatch, tmp_path, tools):
    folder = tmp_path / "flickr30k"
    (folder / "flickr30k-images").mkdir(parents=True)
    for identity in ("1", "2", "3"):
        (folder / "flickr30k-images" / f"{identity}.jpg").write_bytes(tools.picture())
    for identity, ending in (("1", ""), ("2", "_val"), ("3", "_test")):
        content = [{"image_id": identity, "grounded_caption": f"Caption {identity}."}]
        files.json(f"flickr30k/flickr30k_grounded_detail{ending}.json", content)
    (tmp_path / "user.yaml").write_text(
        "model: {arch: minigpt4, model_type: pretrain_vicuna0}\ndatasets: {flickr30k_grounded_detail: {}}\nrun: {}\n"
    )
    monkeypatch.chdir(tmp_path)
    cfg = Config(SimpleNamespace(cfg_path="user.yaml", options=None))
    sections = {
        name: bind(DatasetConfig, node, section=name, source="user.yaml") for name, node in cfg.datasets_cfg.items()
    }
    built = build_datasets(sections, ["train", "val", "test"])["flickr30k_grounded_detail"]
    answers = [next(dataset.open(0, 1, None)).load()["answer"] for dataset in built.values()]
    assert answers == ["Caption 1.", "Caption 2.", "Caption 3."]
