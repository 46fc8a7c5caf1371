"""Training from a cache of features: the same losses, fewer encodings, whatever was killed in between."""

import math
import shutil
import time

import pytest

LOADS_VISION = "loading the vision encoder now"
KNOWN = "image known to the feature cache"


def cached(folder, *options):
    return (f"run.feature_cache={folder}", *options)


@pytest.mark.parametrize(("kind", "processes", "workers"), [("json", 1, 0), ("mixed", 2, 1)])
def test_losses_are_those_without_a_cache_and_the_second_run_encodes_nothing(
    kind, processes, workers, warm, make, tools, tmp_path
):
    options = (f"run.num_workers={workers}",)
    plain, first, second = make(kind), make(kind), make(kind)
    warm.train(plain, *options, processes=processes)
    filling = warm.train(first, *cached(tmp_path, *options), processes=processes)
    reading = warm.train(second, *cached(tmp_path, *options), processes=processes)
    without, filled, read = (tools["logged"](tiny.runs()[0]) for tiny in (plain, first, second))
    assert filled == read
    for (step, loss, rate), (step_read, loss_read, rate_read) in zip(without, read, strict=True):
        assert (step, rate) == (step_read, rate_read)
        assert math.isclose(loss, loss_read, rel_tol=1e-5)
    assert LOADS_VISION in filling.text()
    assert "vision side not needed" not in filling.text()
    assert LOADS_VISION not in reading.text()
    assert reading.text().count("vision side not needed: cache, checkpoint ") == 1
    assert KNOWN in reading.text()


def test_a_run_killed_while_it_fills_the_cache_goes_on_to_the_same_end(warm, make, tools, tmp_path):
    undisturbed, tiny = make("json"), make("json")
    warm.train(undisturbed, *cached(tmp_path / "a"))
    run = warm.start(tiny, *cached(tmp_path / "b", "run.save_every_iters=1"))
    run.wait_for("[3/7]")
    run.kill()
    warm.train(tiny, *cached(tmp_path / "b", "run.resume_ckpt_path=auto"))
    assert tools["final"](tiny.runs()[0])["model"].keys() == tools["final"](undisturbed.runs()[0])["model"].keys()
    assert tools["alike"](tools["final"](tiny.runs()[0])["model"], tools["final"](undisturbed.runs()[0])["model"])


def test_features_of_other_settings_are_not_found_and_damaged_ones_encoded_again(warm, make, tools, tmp_path):
    first, second = make("json"), make("json")
    warm.train(first, *cached(tmp_path))
    assert LOADS_VISION in warm.train(first, *cached(tmp_path, "model.vit_precision=bf16")).text()
    assert len(list(tmp_path.iterdir())) == 2
    for features in tmp_path.glob("*/??/*"):
        features.write_bytes(features.read_bytes()[:-2000])
    fixed = warm.train(second, *cached(tmp_path))
    assert "is damaged; its image is encoded again" in fixed.text()
    assert tools["logged"](second.runs()[0]) == tools["logged"](first.runs()[0])


def test_a_trained_vision_side_cannot_be_cached(warm, make, tmp_path):
    run = warm.start(make("json"), *cached(tmp_path, "model.freeze_qformer=False"))
    assert run.wait() == [2]
    assert "model.freeze_qformer is False" in run.text()


def test_a_cache_that_is_deleted_again_and_again_changes_nothing_but_the_time(warm, make, tools, tmp_path):
    undisturbed, tiny = make("mixed"), make("mixed")
    warm.train(undisturbed, *cached(tmp_path / "a", "run.num_workers=1"), processes=2)
    warm.train(tiny, *cached(tmp_path / "b", "run.num_workers=1"), processes=2)
    run = warm.start(tiny, *cached(tmp_path / "b", "run.num_workers=1"), processes=2)
    run.wait_for("first: ")
    while run.alive():
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        time.sleep(0.02)  # of 14 steps each meets it, and has a core to itself meanwhile
    assert run.wait() == [0, 0], run.text()[-6000:]
    for folder in tiny.runs():
        assert tools["logged"](folder) == tools["logged"](undisturbed.runs()[0])
