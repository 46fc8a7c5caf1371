"""Losses and gradients that are not finite: skipped on all ranks together, counted, named, limited."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

UPDATE = 3
"""The one that rank 1 spoils, of 5, counted from 1."""

FAULTY_MODULE = """
from minigpt4.common.dist_utils import dist
from minigpt4.common.registry import registry
from minigpt4.tasks import ImageTextPretrainTask

@registry.register_task("spoiled")
class Spoiled(ImageTextPretrainTask):
    step = 0

    def train_step(self, model, samples):
        output = super().train_step(model, samples)
        self.step += 1
        if dist.get_rank() == 1 and (self.step == 3 or self.step >= 6):
            output["loss"] = output["loss"] * float("nan")
        return output
"""


def _records(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "nonfinite.jsonl").read_text().splitlines()]


def _same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module", params=["nan_loss", "nan_added", "infinite_gradient", "nan_with_published_sum"])
def spoiled(request, two_ranks) -> list[dict]:
    """A run of 5 updates without mixed precision, by rank; the loss or the gradient of one is bad on rank 1."""
    return [rank[request.param] for rank in two_ranks]


def test_bad_update_is_skipped_and_counted_on_both_ranks(spoiled):
    for rank in spoiled:
        assert rank["skipped"] == 1
        assert rank["adam_steps"] == [4, 4]
        assert _same(rank["weights"][UPDATE - 1], rank["weights"][UPDATE])
        assert not _same(rank["weights"][UPDATE], rank["weights"][UPDATE + 1])


def test_weights_stay_equal_on_both_ranks_and_finite(spoiled):
    for first, second in zip(spoiled[0]["weights"], spoiled[1]["weights"], strict=True):
        assert _same(first, second)
        assert all(tensor.isfinite().all() for tensor in first.values())


@pytest.mark.parametrize("fault", ["nan_loss", "nan_added", "infinite_gradient"])
def test_rest_of_the_run_is_as_without_the_bad_batch(two_ranks, fault):
    for rank in two_ranks:
        assert _same(rank[fault]["weights"][-1], rank["without_the_faulty_batch"]["weights"][-1])


def test_samples_of_both_ranks_are_named(two_ranks):
    records = _records(two_ranks[0]["nan_loss"]["folder"])
    assert {(r["rank"], r["update"], *r["image_ids"]) for r in records} == {(0, 3, "4", "5"), (1, 3, "104", "105")}
    assert {r["rank"]: r["what"] for r in records} == {0: "gradient", 1: "loss"}


def test_infinite_gradient_of_a_finite_loss_is_reported_as_such(two_ranks):
    assert {r["what"] for r in _records(two_ranks[0]["infinite_gradient"]["folder"])} == {"gradient"}


def test_all_micro_batches_of_a_skipped_update_are_named(two_ranks):
    run = two_ranks[0]["nan_in_first_micro_batch"]
    assert run["adam_steps"] == [2, 2]
    assert {tuple(r["image_ids"]) for r in _records(run["folder"])} == {
        ("4", "5", "6", "7"),
        ("104", "105", "106", "107"),
    }


def test_fp16_scaler_halves_at_a_bad_update_only(two_ranks):
    for rank in two_ranks:
        scales = rank["nan_fp16"]["scales"]
        assert scales == [65536.0] * UPDATE + [32768.0] * 3
        assert rank["nan_fp16"]["skipped"] == 1
        assert _same(rank["nan_fp16"]["weights"][-1], two_ranks[0]["nan_fp16"]["weights"][-1])
        assert all(tensor.isfinite().all() for tensor in rank["nan_fp16"]["weights"][-1].values())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, parity_dir, tools) -> tuple[subprocess.CompletedProcess, Path]:
    """`train.py` under torchrun with a task from outside: NaN on rank 1 in step 3, and in all from step 6 on."""
    tiny = tools["make_tiny"](tmp_path_factory.mktemp("stopped"), parity_dir)
    (tiny.folder / "spoiled.py").write_text(FAULTY_MODULE)
    tiny.recipe.write_text(f"imports: [spoiled]\n{tiny.recipe.read_text()}")
    options = ("run.task=spoiled", "run.max_nonfinite_steps=3", "run.iters_per_epoch=50")
    result = tiny.run(*options, processes=2, timeout=120)
    (run,) = tiny.runs()
    return result, run


def test_bad_updates_in_a_row_stop_the_run_with_status_2(stopped):
    result, _ = stopped
    assert result.returncode != 0
    assert "exitcode  : 2" in result.stderr
    assert "error: 3 updates in a row were not finite and were skipped; their samples are in" in result.stderr


def test_stop_names_the_samples_of_every_skipped_update(stopped):
    _, run = stopped
    records = _records(run)
    assert sorted((r["update"], r["rank"]) for r in records) == [(n, rank) for n in (3, 6, 7, 8) for rank in (0, 1)]
    assert all(len(r["image_ids"]) == 2 for r in records)
