"""The sections `run:`, `datasets:` and `model:`: published keys, defaults, and what is refused."""

import dataclasses

import pytest

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.schemas import DatasetConfig, RunConfig

PUBLISHED_KEYS = """
task runner lr_sched init_lr min_lr warmup_lr lr_decay_rate weight_decay beta2 max_epoch iters_per_epoch
warmup_steps accum_grad_iters num_workers batch_size_train batch_size_eval seed output_dir amp resume_ckpt_path
evaluate train_splits valid_splits test_splits device world_size dist_url distributed use_dist_eval_sampler
wandb_log job_name log_freq
"""
NEW_KEYS = """
amp_dtype accum_loss max_grad_norm max_nonfinite_steps save_every_iters keep_last max_bad_share max_bad_in_a_row
tensorboard_log valid_captions generation failure_prompts feature_cache compile parallel
"""
SHARDS = {"builder": "image_caption_shards", "build_info": {"storage": "x/{0..3}.tar"}}
PAIR = {"builder": "image_caption_json", "build_info": {"ann_path": "a.json", "image_path": "images"}}
INFO = PAIR["build_info"]


def _bind(schema: type, **values):
    return bind(schema, values, section="own", source="user.yaml")


def test_keys_of_a_run_are_the_published_ones_and_the_new_ones():
    assert {field.name for field in dataclasses.fields(RunConfig)} == {*PUBLISHED_KEYS.split(), *NEW_KEYS.split()}


def test_training_runs_of_the_reference_are_bound_unchanged(golden):
    for run in golden["train"]["runs"]:
        bound = dataclasses.asdict(_bind(RunConfig, **run["run"]))
        assert {key: bound[key] for key in run["run"]} == run["run"]


def test_default_decoding_is_greedy_and_as_long_as_training_allows():
    settings = _bind(RunConfig).generation
    assert (settings.num_beams, settings.do_sample, settings.max_new_tokens) == (1, False, 160)
    assert (settings.prompt, settings.stop) == (None, None)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("init_lr", [0, float("nan")]),
        ("min_lr", [-1, 1e-3]),
        ("max_epoch", [0, 10**400]),
        ("iters_per_epoch", [-5]),
        ("accum_grad_iters", [0]),
        ("warmup_steps", [-1]),
        ("num_workers", [-1, 10**6]),
        ("batch_size_train", [0]),
        ("batch_size_eval", [10**15]),
        ("beta2", [0, 1.0]),
        ("lr_decay_rate", [0, 1.5]),
        ("max_grad_norm", [0]),
        ("max_bad_share", [-0.1, 1.1]),
        ("device", ["gpu", "cuda:x"]),
        ("amp_dtype", ["fp8"]),
        ("seed", [-1, 1e30, 2**63, True]),
        ("generation.num_beams", [0]),
        ("generation.max_new_tokens", [0]),
        ("generation.min_length", [-1]),
        ("generation.top_p", [0, 1.1]),
        ("generation.temperature", [0]),
        ("generation.repetition_penalty", [-2]),
        ("generation.stop", [[""]]),
        ("generation.do_sample", ["maybe"]),
        ("generation.beams", [5]),
        ("max_epochs", [5]),
        ("max_iters", [5]),
    ],
)
def test_faulty_value_of_a_run_is_refused_by_its_key(key, values):
    outer, _, inner = key.partition(".")
    for value in values:
        with pytest.raises(ConfigError, match=rf"^user\.yaml:\n  - own\.{key}\b"):
            _bind(RunConfig, **{"init_lr": 1e-4, outer: {inner: value} if inner else value})


def test_training_needs_rate_and_length_which_an_evaluation_does_not():
    faults = list(_bind(RunConfig, max_epoch=2).training_faults())
    assert [fault.partition(":")[0] for fault in faults] == ["run.init_lr", "run.iters_per_epoch"]
    assert not list(_bind(RunConfig, evaluate=True).training_faults())


def test_processors_default_to_the_published_ones_and_take_further_keys():
    config = _bind(DatasetConfig, **SHARDS)
    assert config.vis_processor.train.name == "blip2_image_train"
    assert config.vis_processor.eval.name == "blip2_image_eval"
    assert config.text_processor.eval.name == "blip_caption"
    assert config.text_processor.eval.arguments() == {}
    vision = {"train": {"name": "blip2_image_train", "image_size": 448, "min_scale": 0.5}}
    config = _bind(DatasetConfig, **SHARDS, vis_processor=vision)
    assert config.vis_processor.train.arguments() == {"image_size": 448, "min_scale": 0.5}


@pytest.mark.parametrize("good", [SHARDS, PAIR, {**PAIR, "build_info": {"storage": "cc_sbu_align"}}])
def test_either_way_to_name_the_data_is_accepted(good):
    assert _bind(DatasetConfig, **good).builder == good["builder"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("builder", {}),
        ("build_info.storage", {"builder": "image_caption_shards"}),
        ("build_info.ann_path", {"builder": "image_caption_json"}),
        ("build_info.image_path", {**PAIR, "build_info": {"ann_path": "a"}}),
        ("build_info.storage", {**PAIR, "build_info": {**INFO, "storage": "c"}}),
        ("build_info.split_field", {**PAIR, "build_info": {**INFO, "split_field": "s", "val_ann_path": "v"}}),
        ("build_info.storage", {**SHARDS, "build_info": {"storage": "/path/to/{0..3}.tar"}}),
        ("build_info.images", {**SHARDS, "build_info": {"storage": "x", "images": {"storage": "i"}}}),
        ("batch_size", {**SHARDS, "batch_size": 0}),
        ("sample_ratio", {**SHARDS, "sample_ratio": 0}),
        ("data_type", {**SHARDS, "data_type": "videos"}),
        ("sample_ration", {**SHARDS, "sample_ration": 2}),
        ("vis_processor.trian", {**SHARDS, "vis_processor": {"trian": {"name": "x"}}}),
        ("vis_processor.train.image_size", {**SHARDS, "vis_processor": {"train": {"name": "x", "image_size": 0}}}),
    ],
)
def test_faulty_dataset_is_refused_by_its_key(key, values):
    with pytest.raises(ConfigError, match=rf"^user\.yaml:\n  - own\.{key}: "):
        _bind(DatasetConfig, **values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vit_config.depth", {"depth": 2.5}),
        ("vit_config.mlp_ratio", {"mlp_ratio": 0}),
        ("vit_config.dept", {"dept": 3}),
        ("qformer_config.hidden_size", {"hidden_size": 10**9}),
        ("vit_precision", "int8"),
        ("llm_precision", "fp8"),
        ("proj_layers", 2),
        ("vit_layer", 0),
        ("drop_path_rate", 1),
        ("device_8bit", -1),
        ("max_txt_len", 0),
        ("lora_r", 64),
        ("prompt", "Describe."),
    ],
)
def test_faulty_model_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"^user\.yaml:\n  - own\.{key}: "):
        _bind(MiniGPT4Config, **{key.partition(".")[0]: value})


def test_whole_ratio_stays_whole_for_the_feature_cache():
    sizes = [_bind(MiniGPT4Config, vit_config={"mlp_ratio": ratio}).vit_config for ratio in (4, 4.0, 4.5)]
    assert str(sizes) == "[{'mlp_ratio': 4}, {'mlp_ratio': 4}, {'mlp_ratio': 4.5}]"


def test_keys_of_other_lavis_models_may_be_switched_off():
    assert _bind(MiniGPT4Config, lora_r=0, prompt="") == MiniGPT4Config()


@pytest.mark.parametrize("template", ["", "tokenizer", "{}", "###Human: {} ###Assistant: ", "{{json}} {}", "{{{}}}"])
def test_template_with_one_place_is_taken(template):
    assert _bind(MiniGPT4Config, prompt_template=template).prompt_template == template


def test_any_other_template_is_refused_and_not_tried_out():
    wrong = "none|{} {}|{0}|{name}|{0.__class__}|{0[0]}|{!r}|{:10}|{:>9999999999}|{0:>9999999999}|{:{}}|{|} {}|{}}|{{}}"
    for template in wrong.split("|"):
        with pytest.raises(ConfigError, match=r"own\.prompt_template: "):
            _bind(MiniGPT4Config, prompt_template=template)
