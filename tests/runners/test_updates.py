"""Updates from micro-batches: accumulation, clipping, what processes exchange, what is trained."""

import copy
import logging
import math

import pytest
import torch

from minigpt4.common.errors import RunError
from minigpt4.runners.runner_base import TOKEN_UNIT
from minigpt4.tasks import ImageTextPretrainTask

UPDATES = 3
PROJECTION = [[96], [96, 48]]


def _distance(first: dict, second: dict) -> float:
    """Largest relative difference, by norm."""
    return max(((first[name] - second[name]).norm() / first[name].norm()).item() for name in first)


def _run(building, tiny, batches, *options, task=None):
    """A built runner on these batches, one epoch of them, without prompts."""
    lengths = ("run.max_epoch=1", f"run.iters_per_epoch={len(batches)}", building.WITHOUT_PROMPTS)
    options = (*building.CONSTANT_RATE, *options)
    return building.build(tiny.recipe, *lengths, *options, runner=building.fed(batches), task=task)


# How an update is cut


@pytest.fixture(scope="module")
def alone(building, validated):
    """The run that `two_ranks` made with two processes, made by one: 3 updates of 4 micro-batches."""
    runner = _run(building, validated, building.cut(0, 1, 4, UPDATES), "run.accum_grad_iters=4")
    steps = building.gradients(runner)
    runner.train()
    return {"weights": building.trained(runner), "gradients": steps}


@pytest.mark.parametrize("cut", ["two_micro_batches", "double_batch"])
def test_update_and_gradient_do_not_depend_on_processes_and_accumulation(two_ranks, alone, cut):
    """AdamW hides a constant factor in the gradient, but `max_grad_norm` would not."""
    for rank in two_ranks:
        assert _distance(alone["weights"], rank[cut]["weights"]) < 1e-6
        for expected, found in zip(alone["gradients"], rank[cut]["gradients"], strict=True):
            assert _distance(expected, found) < 1e-5


def test_one_large_batch_makes_the_same_update_and_the_published_sum_another(building, validated, alone):
    large = _run(building, validated, building.cut(0, 1, 1, UPDATES))
    summed = _run(building, validated, building.cut(0, 1, 4, UPDATES), "run.accum_grad_iters=4", "run.accum_loss=sum")
    large.train()
    summed.train()
    assert _distance(alone["weights"], building.trained(large)) < 1e-6
    assert _distance(alone["weights"], building.trained(summed)) > 1e-6


def test_mean_makes_a_shorter_update_at_the_end_of_an_epoch(building, validated):
    batches = building.cut(0, 1, 1, 5)
    runner = _run(building, validated, batches, "run.accum_grad_iters=3")
    steps = building.gradients(runner)
    before, model = [], runner.model

    def weights(*_):
        before.append(copy.deepcopy(model.llama_proj.state_dict()))

    runner.optimizer.register_step_pre_hook(weights)
    runner.train()
    assert len(steps) == 2
    model.llama_proj.load_state_dict(before[1])
    losses = [model(batch) for batch in batches[3:]]
    tokens = sum(output["num_tokens"] for output in losses)
    sum(output["loss"] * output["num_tokens"] / tokens for output in losses).backward()
    assert _distance(steps[1], {name: p.grad for name, p in runner.parameters.items()}) < 1e-6


def test_published_sum_carries_the_rest_of_an_epoch_into_the_next(building, validated):
    options = ("run.accum_grad_iters=3", "run.accum_loss=sum", "run.max_epoch=2", "run.iters_per_epoch=4")
    runner = _run(building, validated, [building.batch(2 * n, 2) for n in range(8)], *options)
    steps = building.gradients(runner)
    runner.train()
    assert len(steps) == 2  # after iterations 2 of both epochs, as published: the second holds four micro-batches
    assert runner.num_tokens > 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("run.accum_grad_iters=5",), "4 steps x 10 = 40 samples"),
        (("run.accum_grad_iters=3",), "8 steps x up to 6 = 40 samples"),
        (("run.accum_grad_iters=3", "run.accum_loss=sum"), "6 steps x 6 = 36 samples"),
    ],
)
def test_start_counts_steps_and_samples(building, validated, caplog, options, line):
    runner = building.build(validated.recipe, *options)
    with caplog.at_level(logging.INFO):
        runner._announce()
    runner.loader.close()
    assert line in caplog.messages


# What processes exchange


def test_trained_parameters_alone_are_exchanged_and_gradients_once_an_update(two_ranks):
    for rank in two_ranks:
        run = rank["two_micro_batches"]
        assert [iteration for iteration, _ in run["exchanged"]] == [1, 3, 5]
        assert run["collectives"] == [[], [4704, 1]] * UPDATES  # gradients, then the number of targets
        assert all(sorted(buckets) == PROJECTION for _, buckets in rank["double_batch"]["exchanged"])


def test_start_broadcasts_trained_weights_and_leaves_frozen_ones_alone(two_ranks):
    first, second = (rank["start"] for rank in two_ranks)
    equal = {name for name in first if first[name] == second[name]}
    parameters = {name for name in first if "inv_freq" not in name and "position_ids" not in name}
    assert equal & parameters == {"llama_proj.weight", "llama_proj.bias"}


def test_prompts_of_ranks_differ_while_weights_do_not(two_ranks):
    first, second = (rank["prompts_by_rank"] for rank in two_ranks)
    assert first["drawn"] != second["drawn"]
    assert _distance(first["weights"], second["weights"]) == 0


# What is trained


def test_training_changes_the_projection_and_nothing_else_under_ddp(two_ranks):
    for rank in two_ranks:
        assert sorted(rank["double_batch"]["changed"]) == ["llama_proj.bias", "llama_proj.weight"]


def test_trained_qformer_changes_and_the_rest_does_not(building, validated, parity_dir):
    whole = ("model.freeze_qformer=False", "model.ckpt=null", "run.max_epoch=1", "run.iters_per_epoch=3")
    runner = building.build(validated.recipe, *whole)
    before = building.digests(runner.model)
    trained = {id(p) for p in runner.model.trainable_parameters().values()}
    names = {name for name, p in runner.model.named_parameters() if id(p) in trained}
    runner.train()
    after = building.digests(runner.model)
    assert {name for name in before if before[name] != after[name]} == names
    assert {name.split(".")[0] for name in names} == {"Qformer", "llama_proj"}


# Clipping


def _expected_gradients(runner, samples, max_norm) -> dict[str, torch.Tensor]:
    """Of the runner's first step, by torch's own clipping; the loss is weighted alike, so that fp16 rounds alike."""
    model = copy.deepcopy(runner.model)
    with runner.autocast():
        output = model(samples)
    weight = output["num_tokens"] / TOKEN_UNIT
    runner.scaler.scale(output["loss"] * weight).backward()
    parameters = model.trainable_parameters()
    for parameter in parameters.values():
        parameter.grad.div_(runner.scaler.get_scale() * weight)
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    return {name: p.grad for name, p in parameters.items()}


@pytest.mark.parametrize(("max_norm", "amp"), [(None, True), (0.5, False), (0.5, True), (1e9, False)])
def test_gradient_is_clipped_as_by_torch_after_unscaling(building, validated, max_norm, amp):
    samples = building.batch(0, 2)
    options = ("run.max_grad_norm=null" if max_norm is None else f"run.max_grad_norm={max_norm}", f"run.amp={amp}")
    runner = _run(building, validated, [samples], *options)
    expected, steps = _expected_gradients(runner, samples, max_norm), building.gradients(runner)
    runner.train()
    assert _distance(expected, steps[0]) < 1e-6
    norm = math.sqrt(sum(gradient.double().pow(2).sum().item() for gradient in steps[0].values()))
    assert norm == pytest.approx(0.5, rel=1e-3) if max_norm == 0.5 else norm > 5


class _Hungry(ImageTextPretrainTask):
    def train_step(self, model, samples):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_full_gpu_memory_is_an_error_with_proposals(building, validated):
    runner = _run(building, validated, [building.batch(0, 2)], task=_Hungry())
    with pytest.raises(RunError) as caught:
        runner.train()
    text = str(caught.value)
    assert "Tried to allocate 2.00 GiB" in text
    for proposal in ("batch_size", "run.accum_grad_iters", "model.llm_grad_checkpoint: True", "llm_precision: nf4"):
        assert proposal in text
