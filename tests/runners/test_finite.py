"""Losses and gradients that are not finite: skipped on all ranks together, counted, named, limited."""

import json
from pathlib import Path

import pytest
import torch

UPDATE = 3
"""The one that rank 1 spoils, of 5, counted from 1."""

FAULTY_MODULE = """
from minigpt4.common.dist_utils import get_rank
from minigpt4.common.registry import registry
from minigpt4.tasks import ImageTextPretrainTask

@registry.register_task("spoiled")
class Spoiled(ImageTextPretrainTask):
    step = 0

    def train_step(self, model, samples):
        output = super().train_step(model, samples)
        self.step += 1
        if get_rank() == 1 and (self.step == 3 or self.step >= 6):
            output["loss"] = output["loss"] * float("nan")
        return output
"""


def _records(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "nonfinite.jsonl").read_text().splitlines()]


def _same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


SUM_AND_MEAN = ("nan_with_published_sum", "none_with_published_sum", "none_with_mean_of_means")


@pytest.mark.parametrize("fault", ["nan_loss", "nan_added", "infinite_gradient", "none", *SUM_AND_MEAN])
def test_bad_update_is_skipped_on_both_ranks_and_leaves_no_trace(two_ranks, fault):
    for rank in two_ranks:
        run, other = rank[fault], two_ranks[0][fault]
        assert run["skipped"] == 1
        assert run["adam_steps"] == [4, 4]
        assert _same(run["weights"][UPDATE - 1], run["weights"][UPDATE])
        assert not _same(run["weights"][UPDATE], run["weights"][UPDATE + 1])
        assert all(map(_same, run["weights"], other["weights"]))
        assert all(tensor.isfinite().all() for weights in run["weights"] for tensor in weights.values())
        if fault not in SUM_AND_MEAN:
            assert _same(run["weights"][-1], rank["without_the_faulty_batch"]["weights"][-1])


def test_samples_of_all_ranks_and_micro_batches_are_named(two_ranks):
    runs = two_ranks[0]
    records = _records(runs["nan_loss"]["folder"])
    assert {(r["rank"], r["update"], *r["image_ids"]) for r in records} == {(0, 3, "4", "5"), (1, 3, "104", "105")}
    assert {r["rank"]: r["what"] for r in records} == {0: "gradient", 1: "loss"}
    assert {r["what"] for r in _records(runs["infinite_gradient"]["folder"])} == {"gradient"}
    accumulated = runs["nan_in_first_micro_batch"]
    assert accumulated["adam_steps"] == [2, 2]
    named = {tuple(r["image_ids"]) for r in _records(accumulated["folder"])}
    assert named == {("4", "5", "6", "7"), ("104", "105", "106", "107")}


def test_update_without_answers_is_named_as_such_and_one_rank_may_lack_them(two_ranks):
    for rank in two_ranks:
        assert (rank["none_on_one"]["skipped"], rank["none_on_one"]["adam_steps"]) == (0, [5, 5])
        assert (rank["none_fp16"]["skipped"], rank["none_fp16"]["adam_steps"]) == (1, [4, 4])
        assert rank["none_fp16"]["scales"] == [65536.0] * 6
        assert all(tensor.isfinite().all() for tensor in rank["none_fp16"]["weights"][-1].values())
    assert {(r["update"], r["what"]) for r in _records(two_ranks[0]["none"]["folder"])} == {(UPDATE, "answers")}


def test_fp16_scaler_halves_at_a_bad_update_only(two_ranks):
    for rank in two_ranks:
        run = rank["nan_fp16"]
        assert run["scales"] == [65536.0] * UPDATE + [32768.0] * 3
        assert run["skipped"] == 1
        assert _same(run["weights"][-1], two_ranks[0]["nan_fp16"]["weights"][-1])
        assert all(tensor.isfinite().all() for tensor in run["weights"][-1].values())


def test_bad_updates_in_a_row_stop_the_run_with_status_2_and_the_samples_of_each(tmp_path, parity_dir, tools, warm):
    """With a task from outside: NaN on rank 1 in step 3, and in all from step 6 on."""
    tiny = tools["make_tiny"](tmp_path, parity_dir)
    (tiny.folder / "spoiled.py").write_text(FAULTY_MODULE)
    tiny.recipe.write_text(f"imports: [spoiled]\n{tiny.recipe.read_text()}")
    options = ("run.task=spoiled", "run.max_nonfinite_steps=3", "run.iters_per_epoch=50")
    result = warm.start(tiny, *options, processes=2)
    assert result.wait() == [2, 2]
    assert "error: 3 updates in a row were not finite and were skipped; their samples are in" in result.text()
    (run,) = tiny.runs()
    records = _records(run)
    assert sorted((r["update"], r["rank"]) for r in records) == [(n, rank) for n in (3, 6, 7, 8) for rank in (0, 1)]
    assert all(len(r["image_ids"]) == 2 for r in records)
