"""Every shipped recipe merges and binds, says what the published recipe says, and names weights that exist."""

import dataclasses
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from minigpt4.common.binding import bind, missing_paths
from minigpt4.common.config import Config
from minigpt4.common.config_files import find_default_files
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.schemas import DatasetConfig, GenerationSettings, RunConfig
from minigpt4.common.weights import TABLE, load_table

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "train_configs").glob("minigpt4_*.yaml"))
MINI_RECIPES = sorted((REPOSITORY / "train_configs").glob("mini_*.yaml"))
FLICKR_EVALUATION = REPOSITORY / "eval_configs" / "minigpt4_flickr_eval.yaml"
COCO_EVALUATION = REPOSITORY / "eval_configs" / "minigpt4_coco_eval.yaml"

# lr (init, min, warm-up), warm-up steps, epochs, iterations an epoch, batch per GPU, text length
PUBLISHED = {
    "stage1_pretrain": (1e-4, 8e-5, 1e-6, 5000, 4, 5000, 64, 32),
    "stage2_finetune": (3e-5, 1e-5, 1e-6, 200, 5, 200, 12, 160),
    "flickr_finetune": (3e-5, 1e-5, 1e-6, 200, 5, 500, 2, 160),
}
LLMS = {"7b": "vicuna_7b", "13b": "vicuna_13b", "llama2": "llama2_7b_chat"}
VARIANTS = list(itertools.product(LLMS, PUBLISHED))


def _recipe(llm: str, stage: str) -> Path:
    """File of a recipe; those of the 7B model have the published names, without a size."""
    return REPOSITORY / "train_configs" / f"minigpt4_{stage if llm == '7b' else f'{llm}_{stage}'}.yaml"


def _bound(file: Path, options: list[str] | None = None) -> tuple[MiniGPT4Config, dict[str, DatasetConfig], RunConfig]:
    cfg = Config(SimpleNamespace(cfg_path=str(file), options=options))
    datasets = {
        name: bind(DatasetConfig, node, section=f"datasets.{name}", source=cfg.source)
        for name, node in cfg.datasets_cfg.items()
    }
    model = bind(MiniGPT4Config, cfg.model_cfg, section="model", source=cfg.source)
    return model, datasets, bind(RunConfig, cfg.run_cfg, section="run", source=cfg.source)


def test_every_llm_has_every_recipe_and_no_file_is_untested():
    assert sorted(_recipe(llm, stage) for llm, stage in VARIANTS) == RECIPES
    assert sorted([*RECIPES, *MINI_RECIPES]) == sorted((REPOSITORY / "train_configs").iterdir())


@pytest.mark.parametrize("file", MINI_RECIPES, ids=lambda file: file.stem)
def test_mini_recipe_binds_and_can_train(file):
    model, _, run = _bound(file)
    run.require_training_keys(str(file))
    assert model.model_type == "pretrain_mini"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_binds_and_can_train(file):
    _, _, run = _bound(file)
    run.require_training_keys(str(file))
    assert run.amp
    assert not run.wandb_log


@pytest.mark.parametrize(("llm", "stage"), VARIANTS)
def test_recipe_has_the_published_numbers(llm, stage):
    model, datasets, run = _bound(_recipe(llm, stage))
    lengths = (run.warmup_steps, run.max_epoch, run.iters_per_epoch)
    for dataset in datasets.values():
        found = (run.init_lr, run.min_lr, run.warmup_lr, *lengths, dataset.batch_size, model.max_txt_len)
        assert found == PUBLISHED[stage]


@pytest.mark.parametrize(("llm", "stage"), VARIANTS)
def test_recipe_joins_what_belongs_together(llm, stage):
    model, _, _ = _bound(_recipe(llm, stage))
    table = load_table()
    pairings = yaml.safe_load(TABLE.read_text())["llms"]
    pairing = next(pairing for pairing in pairings if pairing["llm"] == LLMS[llm])
    assert model.llama_model == f"weights/{table.files[LLMS[llm]].path}"
    assert (model.model_type, model.has_qformer) == (pairing["model_type"], pairing["qformer"])
    if stage == "stage1_pretrain":
        assert (model.ckpt, model.prompt_path) == (None, None)
        assert (model.prompt_template, model.end_sym) == ("", "\n")
        return
    start = pairing["stage1"] if stage == "stage2_finetune" and pairing["stage1"] else pairing["aligned"]
    assert model.ckpt == f"weights/{table.files[start].path}"
    assert (model.prompt_template, model.end_sym) == (pairing["prompt_template"], pairing["end_sym"])


@pytest.mark.parametrize("file", [*RECIPES, FLICKR_EVALUATION, COCO_EVALUATION], ids=lambda file: file.stem)
def test_weights_of_a_recipe_are_files_of_the_table(file):
    named = re.findall(r"weights/([\w.-]+)", file.read_text())
    assert named
    assert set(named) <= {entry.path for entry in load_table().files.values()}


def test_recipes_write_into_folders_of_their_own():
    runs = [_bound(file)[2] for file in RECIPES]
    assert len({run.output_dir for run in runs}) == len({run.job_name for run in runs}) == len(RECIPES)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_options_named_in_the_comments_are_keys_of_the_recipe(file):
    options = re.findall(r"\b(?:run|datasets|model)\.[\w.]+=\S+", _comments(file))
    for option in options:
        _bound(file, [option])


@pytest.mark.parametrize(
    ("stage", "options", "samples"),
    [
        ("stage1_pretrain", "run.accum_grad_iters=4 run.iters_per_epoch=20000 run.warmup_steps=20000", 256),
        ("stage2_finetune", "run.accum_grad_iters=4 run.iters_per_epoch=800 run.warmup_steps=800", 12),
        ("flickr_finetune", "run.accum_grad_iters=7 run.iters_per_epoch=3500 run.warmup_steps=1400", 14),
    ],
)
def test_one_gpu_makes_the_published_updates_with_the_options_of_the_comment(stage, options, samples):
    file = _recipe("7b", stage)
    line = next(line for line in _comments(file).splitlines() if options in line)
    _, datasets, run = _bound(file, [word for word in line.split() if "=" in word])
    published = PUBLISHED[stage]
    assert next(iter(datasets.values())).batch_size * run.accum_grad_iters == samples
    assert run.iters_per_epoch == published[5] * run.accum_grad_iters
    assert run.warmup_steps == published[3] * run.accum_grad_iters


def _comments(file: Path) -> str:
    return "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))


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
    assert (model.has_qformer, model.end_sym, model.prompt_template) == (False, "\n", "")


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


def test_flickr_evaluation_asks_the_model_that_the_recipe_trains():
    trained, _, _ = _bound(_recipe("7b", "flickr_finetune"))
    evaluated, datasets, run = _bound(FLICKR_EVALUATION)
    differing = {name for name, value in vars(trained).items() if vars(evaluated)[name] != value}
    assert differing == {"ckpt"}
    assert datasets["flickr30k_grounded_detail"].build_info.test_ann_path.endswith("_test.json")
    assert run.test_splits == ["test"]


def test_coco_evaluation_differs_in_data_and_prompt_alone():
    flickr, _, _ = _bound(FLICKR_EVALUATION)
    coco, datasets, run = _bound(COCO_EVALUATION)
    assert {name for name, value in vars(flickr).items() if vars(coco)[name] != value} == {"prompt_path"}
    assert datasets["coco_karpathy"].build_info.split_field == "split"
    ours = {"prompt": run.generation.prompt, "max_new_tokens": 60}
    assert run.generation == dataclasses.replace(GenerationSettings(), **ours)
    assert run.test_splits == ["test"]


def test_flickr_evaluation_spells_out_the_default_decoding():
    assert _bound(FLICKR_EVALUATION)[2].generation == GenerationSettings()


def test_file_with_the_keys_of_the_released_demo_config_binds(tmp_path):
    user = tmp_path / "user.yaml"
    user.write_text(EVALUATION)
    model, datasets, run = _bound(user)
    assert model.low_resource
    assert datasets["cc_sbu_align"].vis_processor.train.name == "blip2_image_eval"
    assert run.init_lr is None


@pytest.mark.parametrize("file", [*RECIPES, *MINI_RECIPES], ids=lambda file: file.stem)
def test_no_recipe_switches_a_saving_of_the_training_step_off(file):
    model, _, _ = _bound(file)
    defaults = MiniGPT4Config()
    for key in ("llm_attention", "llm_packing", "llm_prefix_cache", "llm_logits"):
        assert getattr(model, key) == getattr(defaults, key), key
