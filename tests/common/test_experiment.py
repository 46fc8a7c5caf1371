"""Sections bound together: what a whole configuration must agree on."""

from types import SimpleNamespace

import pytest

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.experiment import read_experiment

MODEL = "model: {arch: minigpt4, model_type: pretrain_vicuna0}\n"
RUN = "run: {init_lr: 1e-4, max_epoch: 1, iters_per_epoch: 2}\n"
SMALL_IMAGES = "{batch_size: 2, vis_processor: {train: {name: blip2_image_train, image_size: 112}}}"


@pytest.fixture
def read(tmp_path):
    def read_text(text: str):
        file = tmp_path / "user.yaml"
        file.write_text(text)
        return read_experiment(Config(SimpleNamespace(cfg_path=str(file), options=None)))

    return read_text


def test_batch_size_is_the_largest_of_the_datasets_and_the_runs_for_those_without(read):
    datasets = "datasets: {laion: {batch_size: 3}, cc_sbu: {}}\n"
    assert read(MODEL + datasets + RUN.replace("2}", "2, batch_size_train: 5}")).batch_size() == 5


def test_dataset_without_any_batch_size_is_an_error(read):
    with pytest.raises(ConfigError, match="no batch size; set datasets.NAME.batch_size or run.batch_size_train"):
        read(MODEL + "datasets: {laion: {batch_size: 3}, cc_sbu: {}}\n" + RUN).batch_size()


def test_processor_of_another_image_size_than_the_models_is_an_error(read):
    with pytest.raises(ConfigError, match="image_size: 112 must equal model.image_size: 224"):
        read(MODEL + f"datasets: {{laion: {SMALL_IMAGES}}}\n" + RUN)


def test_run_that_trains_needs_its_numbers(read):
    with pytest.raises(ConfigError, match="run.max_epoch, run.iters_per_epoch: needed to train"):
        read(MODEL + "datasets: {}\nrun: {init_lr: 1e-4}\n")


def test_model_class_without_a_schema_is_an_error(read, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model_without_schema.py").write_text(
        "from minigpt4.common.registry import registry\n"
        "@registry.register_model('without_schema')\n"
        "class WithoutSchema: pass\n"
    )
    model = "imports: [model_without_schema]\nmodel: {arch: without_schema, model_type: any}\n"
    with pytest.raises(ConfigError, match="WithoutSchema needs a `config_class`"):
        read(model + "datasets: {}\n" + RUN)


def test_compile_and_liger_exclude_each_other(read):
    model = MODEL.replace("}", ", llm_kernels: liger}")
    with pytest.raises(ConfigError, match=r"run\.compile and model\.llm_kernels: liger both fuse"):
        read(model + "datasets: {laion: {batch_size: 3}}\n" + RUN.replace("2}", "2, compile: True}"))
