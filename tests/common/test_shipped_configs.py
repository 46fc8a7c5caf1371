"""Every shipped recipe merges and binds, says what the published recipe says, and names weights that exist."""

import dataclasses
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from minigpt4.common.binding import missing_paths
from minigpt4.common.config import Config
from minigpt4.common.config_files import find_default_files
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.schemas import GenerationSettings
from minigpt4.common.weights import TABLE, load_table
from minigpt4.mini.llava import write_clip

REPOSITORY = Path(__file__).parents[2]
TRAINING = REPOSITORY / "train_configs"
RECIPES, MINI_RECIPES, LLAVA_RECIPES = (
    sorted(TRAINING.glob(pattern)) for pattern in ("minigpt4_*.yaml", "mini_*.yaml", "llava*.yaml")
)
LLAVA_EVALS = sorted((REPOSITORY / "eval_configs").glob("llava_*.yaml"))
FLICKR, COCO = (REPOSITORY / "eval_configs" / f"minigpt4_{data}_eval.yaml" for data in ("flickr", "coco"))

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
    return TRAINING / f"minigpt4_{stage if llm == '7b' else f'{llm}_{stage}'}.yaml"


def _bound(file: Path, options: list[str] | None = None, training: bool = False) -> Config:
    return Config(SimpleNamespace(cfg_path=str(file), options=options)).validate(training=training)


def _user(folder: Path, text: str) -> Config:
    file = folder / "user.yaml"
    file.write_text(text)
    return _bound(file)


def _comments(file: Path) -> str:
    return "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))


# data, records, epochs, samples an update, lr, that of the projection, rule of the LLM
LLAVA = {
    "llava_pretrain": ("llava_cc3m_pretrain_595k", 595_375, 1, 128, 2e-3, None, "frozen"),
    "llava_finetune": ("llava_instruct_150k", 157_712, 3, 128, 2e-5, None, "full"),
    "llava_finetune_lora": ("llava_instruct_80k", 80_000, 1, 128, 2e-5, None, "lora"),
    "llava15_pretrain": ("blip_laion_cc_sbu_558k", 558_128, 1, 256, 1e-3, None, "frozen"),
    "llava15_finetune": ("llava_v1_5_mix665k", 665_298, 1, 128, 2e-5, None, "full"),
    "llava15_finetune_lora": ("llava_v1_5_mix665k", 665_298, 1, 128, 2e-4, 2e-5, "lora"),
}


@pytest.mark.parametrize("name", LLAVA)
def test_llava_recipe_has_the_published_numbers(name):
    kind, records, epochs, samples, lr, projection_lr, rule = LLAVA[name]
    config = _bound(TRAINING / f"{name}.yaml", training=True)
    run, model, data = config.run, config.model, config.datasets["llava_conversations"]
    is_15, stage1 = name.startswith("llava15"), rule == "frozen"
    assert (data.type, data.batch_size * 8) == (kind, samples)
    assert (run.max_epoch, run.iters_per_epoch) == (epochs, -(-records // samples))
    assert (run.init_lr, run.min_lr, run.warmup_ratio, run.lr_sched) == (lr, 0.0, 0.03, "cosine_lr")
    assert (run.weight_decay, run.beta2, run.max_grad_norm, run.seed, run.num_workers) == (0.0, 0.999, 1.0, 42, 4)
    assert (run.amp, run.amp_dtype, run.accum_loss) == (True, "bf16", "mean_of_means")
    assert (model.train.projection.rule, model.train.projection.lr) == ("full", projection_lr)
    assert (model.train.llm.rule, model.train.vision.rule) == (rule, "frozen")
    if rule == "lora":
        llm = model.train.llm
        assert (llm.r, llm.alpha, llm.dropout, llm.target_modules) == (*((128, 256) if is_15 else (64, 16)), 0.05, None)
    assert (model.image_size, model.projection) == ((336, "mlp2x_gelu") if is_15 else (224, "linear"))
    assert (model.vit_layer, model.tokenizer_model_max_length, model.llm_grad_checkpoint) == (-2, 2048, True)
    assert model.conv_template == ("plain" if stage1 else "v1")
    assert model.image_aspect_ratio == ("pad" if is_15 and not stage1 else "square")
    assert data.vis_processor.train.kwargs["image_aspect_ratio"] == model.image_aspect_ratio
    assert data.group_by_modality_length == (is_15 and not stage1)
    assert (model.ckpt is None) == stage1


@pytest.fixture(scope="module")
def mini_clip(tmp_path_factory):
    """The tower of mini_llava_*.yaml, which the quickstart writes."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_clip(folder)
    return f"model.vit_model={folder}"


@pytest.mark.parametrize("file", [*RECIPES, *MINI_RECIPES, *LLAVA_RECIPES], ids=lambda file: file.stem)
def test_recipe_can_train_with_the_options_in_its_comments_and_switches_no_saving_of_the_step_off(file, mini_clip):
    own = [mini_clip] if file.stem.startswith("mini_llava") else []
    config, defaults = _bound(file, own, training=True), MiniGPT4Config()
    assert not config.run.wandb_log
    assert (config.model.model_type in ("pretrain_mini", "mini")) == (file in MINI_RECIPES)
    assert config.run.amp or file in MINI_RECIPES
    for key in ("llm_attention", "llm_packing", "llm_prefix_cache", "llm_logits"):
        assert getattr(config.model, key) == getattr(defaults, key), key
    for option in re.findall(r"\b(?:run|datasets|model)\.[\w.]+=\S+", _comments(file)):
        _bound(file, [*own, option])


def test_every_llm_has_every_recipe_each_with_a_folder_of_its_own():
    assert sorted(_recipe(llm, stage) for llm, stage in VARIANTS) == RECIPES
    assert [file.stem for file in LLAVA_RECIPES] == sorted(LLAVA)
    assert sorted([*RECIPES, *MINI_RECIPES, *LLAVA_RECIPES]) == sorted(TRAINING.glob("*.yaml"))
    runs = [_bound(file).run for file in [*RECIPES, *LLAVA_RECIPES]]
    assert len({run.output_dir for run in runs}) == len({run.job_name for run in runs}) == len(runs)


@pytest.mark.parametrize(("llm", "stage"), VARIANTS)
def test_recipe_has_the_published_numbers_and_joins_what_belongs_together(llm, stage):
    config, table = _bound(_recipe(llm, stage)), load_table()
    run, model = config.run, config.model
    numbers = (run.init_lr, run.min_lr, run.warmup_lr, run.warmup_steps, run.max_epoch, run.iters_per_epoch)
    batches = {dataset.batch_size for dataset in config.datasets.values()}
    assert {(*numbers, batch, model.max_txt_len) for batch in batches} == {PUBLISHED[stage]}
    pairing = next(pairing for pairing in yaml.safe_load(TABLE.read_text())["llms"] if pairing["llm"] == LLMS[llm])
    assert model.llama_model == f"weights/{table.files[LLMS[llm]].path}"
    assert (model.model_type, model.has_qformer) == (pairing["model_type"], pairing["qformer"])
    chat = (model.prompt_template, model.end_sym)
    if stage == "stage1_pretrain":
        assert (model.ckpt, model.prompt_path, *chat) == (None, None, "", "\n")
        return
    start = pairing["stage1"] if stage == "stage2_finetune" and pairing["stage1"] else pairing["aligned"]
    assert model.ckpt == f"weights/{table.files[start].path}"
    assert chat == (pairing["prompt_template"], pairing["end_sym"])


@pytest.mark.parametrize("file", [*RECIPES, *LLAVA_RECIPES, *LLAVA_EVALS, FLICKR, COCO], ids=lambda file: file.stem)
def test_weights_of_a_recipe_are_files_of_the_table(file):
    named = re.findall(r"weights/([\w.-]+)", file.read_text())
    assert named
    assert set(named) <= {entry.path for entry in load_table().files.values()}


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
    config = _bound(file, [word for word in line.split() if "=" in word])
    run, published = config.run, PUBLISHED[stage]
    assert next(iter(config.datasets.values())).batch_size * run.accum_grad_iters == samples
    assert run.iters_per_epoch == published[5] * run.accum_grad_iters
    assert run.warmup_steps == published[3] * run.accum_grad_iters


def test_prompts_come_with_the_checkout_and_all_hold_the_image(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = _bound(_recipe("7b", "flickr_finetune"))
    assert config.model.prompt_path == "prompts/alignment.txt"
    assert "model.prompt_path" not in dict(missing_paths(config.sections()))
    lines = (REPOSITORY / "prompts/alignment.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 4
    assert all(line.startswith("<Img><ImageHere></Img> ") for line in lines)


@pytest.mark.parametrize(
    ("name", "file"), [(n, f) for n, files in find_default_files().datasets.items() for f in files.values()]
)
def test_shipped_dataset_default_is_complete_by_itself_under_either_model(name, file, tmp_path):
    if name == "llava_conversations":
        text = f"model: {{arch: llava, model_type: v1.5}}\nrun: {{}}\ndatasets: {{{name}: {{type: {file.stem}}}}}\n"
        assert _user(tmp_path, text).datasets[name].type == file.stem
        with pytest.raises(ConfigError, match="llava_conversations goes with arch: llava"):
            _user(
                tmp_path, text.replace("arch: llava, model_type: v1.5", "arch: minigpt4, model_type: pretrain_vicuna0")
            )
        return
    for kind, has_qformer in (("vicuna0", True), ("llama2", False)):
        text = f"model: {{arch: minigpt4, model_type: pretrain_{kind}}}\nrun: {{}}\n"
        config = _user(tmp_path, f"{text}datasets: {{{name}: {{type: {file.stem}}}}}\n")
        assert config.datasets[name].type == file.stem
        assert (config.model.has_qformer, config.model.end_sym, config.model.prompt_template) == (has_qformer, "\n", "")


RELEASED = """
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
    config = _user(tmp_path, RELEASED)
    assert config.model.low_resource
    assert config.datasets["cc_sbu_align"].vis_processor.train.name == "blip2_image_eval"
    assert config.run.init_lr is None


def test_evaluations_ask_the_model_that_the_recipe_trains():
    trained, flickr, coco = map(_bound, (_recipe("7b", "flickr_finetune"), FLICKR, COCO))
    assert flickr.model == dataclasses.replace(trained.model, ckpt=flickr.model.ckpt)
    assert coco.model == dataclasses.replace(flickr.model, prompt_path=coco.model.prompt_path)
    assert flickr.datasets["flickr30k_grounded_detail"].build_info.test_ann_path.endswith("_test.json")
    assert coco.datasets["coco_karpathy"].build_info.split_field == "split"
    assert flickr.run.test_splits == coco.run.test_splits == ["test"]
    assert flickr.run.generation == GenerationSettings(), "the defaults are spelt out"
    own = {"prompt": coco.run.generation.prompt, "max_new_tokens": 60}
    assert coco.run.generation == dataclasses.replace(GenerationSettings(), **own)
