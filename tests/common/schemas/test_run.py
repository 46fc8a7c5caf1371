"""The `run:` section: published keys, defaults, ranges."""

import dataclasses

import pytest

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError
from minigpt4.common.schemas import RunConfig

PUBLISHED_KEYS = {
    "task",
    "runner",
    "lr_sched",
    "init_lr",
    "min_lr",
    "warmup_lr",
    "lr_decay_rate",
    "weight_decay",
    "beta2",
    "max_epoch",
    "iters_per_epoch",
    "warmup_steps",
    "accum_grad_iters",
    "num_workers",
    "batch_size_train",
    "batch_size_eval",
    "seed",
    "output_dir",
    "amp",
    "resume_ckpt_path",
    "evaluate",
    "train_splits",
    "valid_splits",
    "test_splits",
    "device",
    "world_size",
    "dist_url",
    "distributed",
    "use_dist_eval_sampler",
    "wandb_log",
    "job_name",
    "log_freq",
}
NEW_KEYS = {
    "amp_dtype",
    "accum_loss",
    "max_grad_norm",
    "max_nonfinite_steps",
    "save_every_iters",
    "keep_last",
    "max_bad_share",
    "max_bad_in_a_row",
    "tensorboard_log",
    "valid_captions",
    "generation",
    "failure_prompts",
    "feature_cache",
    "compile",
    "parallel",
}


def _bind(**values) -> RunConfig:
    return bind(RunConfig, values, section="run", source="user.yaml")


def test_keys_are_the_published_ones_and_the_new_ones():
    assert {field.name for field in dataclasses.fields(RunConfig)} == PUBLISHED_KEYS | NEW_KEYS


def test_training_runs_of_the_reference_are_bound_unchanged(golden):
    for run in golden["train"]["runs"]:
        bound = dataclasses.asdict(_bind(**run["run"]))
        assert {key: bound[key] for key in run["run"]} == run["run"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"init_lr": 0}, "run.init_lr: 0.0 must be above 0"),
        ({"init_lr": 1e-5, "min_lr": 1e-4}, "run.min_lr: 0.0001 must be at most init_lr (1e-05)"),
        ({"min_lr": -1}, "run.min_lr: -1.0 must be at least 0"),
        ({"max_epoch": 0}, "run.max_epoch: 0 must be at least 1"),
        ({"iters_per_epoch": -5}, "run.iters_per_epoch: -5 must be at least 1"),
        ({"accum_grad_iters": 0}, "run.accum_grad_iters: 0 must be at least 1"),
        ({"warmup_steps": -1}, "run.warmup_steps: -1 must be at least 0"),
        ({"num_workers": -1}, "run.num_workers: -1 must be at least 0"),
        ({"batch_size_train": 0}, "run.batch_size_train: 0 must be at least 1"),
        ({"batch_size_eval": 10**15}, "run.batch_size_eval: 1000000000000000 must be at most 1,000,000"),
        ({"beta2": 1.0}, "run.beta2: 1.0 must be between 0 and 1"),
        ({"lr_decay_rate": 1.5}, "run.lr_decay_rate: 1.5 must be above 0 and at most 1"),
        ({"device": "gpu"}, "run.device: 'gpu' must be cuda, cuda:N, cpu or mps"),
        ({"amp_dtype": "fp8"}, "run.amp_dtype: 'fp8' must be one of fp16, bf16"),
        ({"seed": 1e30}, "run.seed: 1e+30 must be a whole number below 2^63"),
        ({"seed": 2**63}, "run.seed: 9223372036854775808 must be a whole number"),
        ({"seed": True}, "run.seed: True must be a whole number"),
        ({"init_lr": float("nan")}, "run.init_lr: nan must be a number"),
        ({"max_epoch": 10**400}, "run.max_epoch: 1000"),
        ({"num_workers": 10**6}, "run.num_workers: 1000000 must be at most 1,000"),
        ({"output_dir": "~nouser/x"}, "run.output_dir: '~nouser/x'"),
        ({"output_dir": "a\0b"}, "run.output_dir: 'a\\x00b': holds a NUL"),
        ({"output_dir": "a/" + "n" * 256}, "run.output_dir: 'a/nnn"),
        ({"feature_cache": "d/" * 3000}, "run.feature_cache: 'd/d/"),
        ({"resume_ckpt_path": "\ud800"}, "run.resume_ckpt_path: '\\ud800'"),
        ({"max_epochs": 5}, "run.max_epochs: unknown key; did you mean 'max_epoch'?"),
        ({"max_iters": 5}, "run.max_iters: runs count epochs here"),
    ],
)
def test_faulty_value_is_refused(values, complaint):
    with pytest.raises(ConfigError) as error:
        _bind(**values)
    assert complaint in str(error.value)


def test_training_needs_rate_and_length():
    with pytest.raises(ConfigError, match=r"user.yaml: run.init_lr, run.iters_per_epoch: needed to train"):
        _bind(max_epoch=2).require_training_keys("user.yaml")


@pytest.mark.parametrize("values", [{"evaluate": True}, {"init_lr": 1e-4, "max_epoch": 1, "iters_per_epoch": 1}])
def test_evaluation_or_a_complete_run_needs_nothing_more(values):
    _bind(**values).require_training_keys("user.yaml")
