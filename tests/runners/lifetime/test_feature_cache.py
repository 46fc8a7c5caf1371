"""Training from a cache of features: the same losses, fewer encodings, whatever was killed in between."""

import math
import shutil
import time

import pytest

LOADS_VISION = "loading the vision encoder now"
CASES = {"json": ((), 1), "mixed": (("run.num_workers=1",), 2)}
"""Options and number of processes by kind of data."""


@pytest.fixture(scope="module")
def filled(warm, make, tmp_path_factory):
    """`filled(kind)`: a run that filled a cache, made once: (its folder, what it said, the cache)."""
    made = {}

    def fill(kind):
        if kind not in made:
            (options, processes), cache, tiny = CASES[kind], tmp_path_factory.mktemp("filled") / "cache", make(kind)
            said = warm.train(tiny, *options, f"run.feature_cache={cache}", processes=processes).text()
            made[kind] = tiny.runs()[0], said, cache
        return made[kind]

    return fill


@pytest.mark.parametrize("kind", CASES)
def test_losses_are_those_without_a_cache_and_the_second_run_encodes_nothing(
    kind, filled, warm, make, tools, undisturbed
):
    (options, processes), (first, said, cache), second = CASES[kind], filled(kind), make(kind)
    reading = warm.train(second, *options, f"run.feature_cache={cache}", processes=processes).text()
    without = tools["logged"](undisturbed(kind, *options, processes=processes))
    read = tools["logged"](second.runs()[0])
    assert read == tools["logged"](first)
    for (step, loss, rate), (step_read, loss_read, rate_read) in zip(without, read, strict=True):
        assert (step, rate) == (step_read, rate_read)
        assert math.isclose(loss, loss_read, rel_tol=1e-5)
    assert LOADS_VISION in said
    assert "vision side not needed" not in said
    assert LOADS_VISION not in reading
    assert reading.count("vision side not needed: cache, checkpoint ") == 1
    assert "image known to the feature cache" in reading


def test_a_run_killed_while_it_fills_the_cache_goes_on_to_the_same_end(filled, warm, make, tools, tmp_path):
    tiny, cache = make("json"), f"run.feature_cache={tmp_path}"
    run = warm.start(tiny, cache, "run.save_every_iters=1")
    run.wait_for("[3/7]")
    run.kill()
    warm.train(tiny, cache, "run.resume_ckpt_path=auto")
    ended, whole = (tools["final"](folder)["model"] for folder in (tiny.runs()[0], filled("json")[0]))
    assert tools["alike"](ended, whole)


def test_features_of_other_settings_are_not_found_and_damaged_ones_encoded_again(filled, warm, make, tools, tmp_path):
    first, _, cache = filled("json")
    copy = shutil.copytree(cache, tmp_path / "copy")
    option, other, second = f"run.feature_cache={copy}", make("json"), make("json")
    assert LOADS_VISION in warm.train(other, option, "model.vit_precision=bf16").text()
    assert len(list(copy.iterdir())) == 2
    for features in copy.glob("*/??/*"):
        features.write_bytes(features.read_bytes()[:-2000])
    assert "is damaged; its image is encoded again" in warm.train(second, option).text()
    assert tools["logged"](second.runs()[0]) == tools["logged"](first)


def test_a_trained_vision_side_cannot_be_cached(warm, make, tmp_path):
    run = warm.start(make("json"), f"run.feature_cache={tmp_path}", "model.freeze_qformer=False")
    assert run.wait() == [2]
    assert "model.freeze_qformer is False" in run.text()


def test_a_cache_that_is_deleted_again_and_again_changes_nothing_but_the_time(filled, warm, make, tools, tmp_path):
    (options, processes), (first, _, cache), tiny = CASES["mixed"], filled("mixed"), make("mixed")
    copy = shutil.copytree(cache, tmp_path / "copy")
    run = warm.start(tiny, *options, f"run.feature_cache={copy}", processes=processes)
    run.wait_for("first: ")
    while run.alive():
        shutil.rmtree(copy, ignore_errors=True)
        time.sleep(0.02)  # of 14 steps each meets it, and has a core to itself meanwhile
    assert run.wait() == [0, 0], run.text()[-6000:]
    assert tools["logged"](tiny.runs()[0]) == tools["logged"](first)
