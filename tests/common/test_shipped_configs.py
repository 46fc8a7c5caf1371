"""Every shipped recipe merges and binds, and says what the published recipe says."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4.common.config import Config
from minigpt4.common.default_files import find_default_files
from minigpt4.common.schemas.binding import bind
from minigpt4.common.schemas.datasets import DatasetConfig
from minigpt4.common.schemas.model import MiniGPT4Config
from minigpt4.common.schemas.paths import missing_paths
from minigpt4.common.schemas.run import RunConfig

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "train_configs").glob("*.yaml"))

# lr (init, min, warm-up), warm-up steps, epochs, iterations an epoch, batch per GPU, end symbol, text length
PUBLISHED = {
    "minigpt4_stage1_pretrain": (1e-4, 8e-5, 1e-6, 5000, 4, 5000, 64, "\n", 32),
    "minigpt4_stage2_finetune": (3e-5, 1e-5, 1e-6, 200, 5, 200, 12, "###", 160),
    "minigpt4_flickr_finetune": (3e-5, 1e-5, 1e-6, 200, 5, 500, 2, "###", 160),
}


def _config(file: Path) -> Config:
    return Config(SimpleNamespace(cfg_path=str(file), options=None))


def _bound(file: Path) -> tuple[MiniGPT4Config, dict[str, DatasetConfig], RunConfig]:
    cfg = _config(file)
    datasets = {
        name: bind(DatasetConfig, node, section=f"datasets.{name}", source=cfg.source)
        for name, node in cfg.datasets_cfg.items()
    }
    model = bind(MiniGPT4Config, cfg.model_cfg, section="model", source=cfg.source)
    return model, datasets, bind(RunConfig, cfg.run_cfg, section="run", source=cfg.source)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_binds_and_can_train(file):
    model, _, run = _bound(file)
    run.require_training_keys(str(file))
    assert model.llama_model == "weights/vicuna-7b"
    assert run.amp
    assert not run.wandb_log


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_has_the_published_numbers(file):
    model, datasets, run = _bound(file)
    lengths = (run.warmup_steps, run.max_epoch, run.iters_per_epoch)
    for dataset in datasets.values():
        text = (model.end_sym, model.max_txt_len)
        found = (run.init_lr, run.min_lr, run.warmup_lr, *lengths, dataset.batch_size, *text)
        assert found == PUBLISHED[file.stem]


def test_stage_1_mixes_its_sources_as_published():
    _, datasets, _ = _bound(REPOSITORY / "train_configs/minigpt4_stage1_pretrain.yaml")
    assert {name: dataset.sample_ratio for name, dataset in datasets.items()} == {"laion": 115, "cc_sbu": 14}


def test_only_weights_and_data_are_missing_from_a_fresh_checkout(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    model, datasets, run = _bound(REPOSITORY / "train_configs/minigpt4_flickr_finetune.yaml")
    assert model.prompt_path == "prompts/alignment.txt"
    keys = {key for key, _ in missing_paths({"model": model, "run": run, **datasets})}
    assert "model.prompt_path" not in keys


@pytest.mark.parametrize(
    ("name", "file"), [(n, f) for n, files in find_default_files().datasets.items() for f in files.values()]
)
def test_shipped_dataset_default_is_complete_by_itself(name, file, tmp_path):
    user = tmp_path / "user.yaml"
    model = "{arch: minigpt4, model_type: pretrain_vicuna0}"
    user.write_text(f"model: {model}\ndatasets: {{{name}: {{type: {file.stem}}}}}\nrun: {{}}\n")
    _, datasets, _ = _bound(user)
    assert datasets[name].type == file.stem


def test_llama2_model_type_differs_from_vicuna_as_published(tmp_path):
    user = tmp_path / "user.yaml"
    user.write_text("model: {arch: minigpt4, model_type: pretrain_llama2}\ndatasets: {cc_sbu_align: {}}\nrun: {}\n")
    model, _, _ = _bound(user)
    assert (model.has_qformer, model.end_sym, model.prompt_template) == (False, "</s>", "[INST] {} [/INST] ")


def test_instructions_all_hold_the_image():
    lines = (REPOSITORY / "prompts/alignment.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 4
    assert all(line.startswith("<Img><ImageHere></Img> ") for line in lines)


EVALUATION = """
model:
  arch: minigpt4
  model_type: pretrain_vicuna0
  max_txt_len: 160
  end_sym: "###"
  low_resource: True
  prompt_template: '###Human: {} ###Assistant: '
  ckpt: weights/pretrained_minigpt4_7b.pth
datasets:
  cc_sbu_align:
    vis_processor: {train: {name: blip2_image_eval, image_size: 224}}
    text_processor: {train: {name: blip_caption}}
run:
  task: image_text_pretrain
"""


def test_file_with_the_keys_of_the_released_demo_config_binds(tmp_path):
    user = tmp_path / "user.yaml"
    user.write_text(EVALUATION)
    model, datasets, run = _bound(user)
    assert model.low_resource
    assert datasets["cc_sbu_align"].vis_processor.train.name == "blip2_image_eval"
    assert run.init_lr is None
