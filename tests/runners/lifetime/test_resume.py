"""A run that goes on from a checkpoint repeats the uninterrupted run bit for bit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from minigpt4.common.checkpoint import card_path
from minigpt4.common.errors import WeightsError

AUTO = "run.resume_ckpt_path=auto"


WORKERS = "run.num_workers=2"
MEAN, SUM = (("run.accum_grad_iters=3", f"run.accum_loss={kind}") for kind in ("mean", "sum"))
CASES = {
    "json": (1, "json"),
    "json, 2 workers, sum": (1, "json", WORKERS, *SUM),
    "shards, mean": (1, "shards", *MEAN),
    "shards, 2 workers": (1, "shards", WORKERS, "run.max_grad_norm=0.1"),
    "mixed, fp16, sum": (1, "mixed", *SUM, "run.amp=True"),
    "2 processes, json, 2 workers": (2, "json", WORKERS),
    "2 processes, json, sum": (2, "json", *SUM),
    "2 processes, shards, 2 workers, mean": (2, "shards", WORKERS, *MEAN),
    "2 processes, mixed, 2 workers, sum": (2, "mixed", WORKERS, *SUM),
}
"""Processes, data, options."""


@pytest.fixture(scope="module", params=CASES)
def whole(request, warm, make, tools):
    """An uninterrupted run that met bad samples and saved after every iteration: its folder, and what trains so."""
    processes, kind, *options = CASES[request.param]
    tiny = make(kind)

    def train(*more):
        return warm.train(tiny, *options, *more, processes=processes)

    train("run.save_every_iters=1")
    (run,) = tiny.runs()
    counts = tools["final"](run)["state"]["ranks"][0]["data"]["counts"]
    assert all(bad > 0 for _, bad in counts.values())
    return run, train


def test_resume_from_a_path_repeats_the_rest_in_a_new_folder(whole, tools, tmp_path):
    run, train = whole
    train(f"run.resume_ckpt_path={run}/checkpoint_iter_4.pth", f"run.output_dir={tmp_path}")
    (resumed,) = tmp_path.iterdir()
    assert tools["logged"](resumed) == tools["logged"](run)[4:]
    assert (resumed / "log.txt").read_text() == (run / "log.txt").read_text()
    assert tools["alike"](tools["final"](resumed), tools["final"](run))


def test_auto_goes_on_from_the_end_of_an_epoch_in_the_same_folder_and_logs_every_step_once(whole, tools, tmp_path):
    run, train = whole
    copy = shutil.copytree(run, tmp_path / run.name)
    for path in [
        *copy.glob("checkpoint_iter_[89].*"),
        *copy.glob("checkpoint_iter_1?.*"),
        *copy.glob("checkpoint_1.*"),
    ]:
        path.unlink()
    assert f"Going on from {copy / 'checkpoint_0.pth'}" in train(AUTO, f"run.output_dir={tmp_path}").text()
    assert list(tmp_path.iterdir()) == [copy]
    assert [step for step, _, _ in tools["logged"](copy)] == list(range(14))
    tools["compare"](copy, run)


def test_a_validation_that_a_kill_cut_off_is_noted_once(validated, warm, tmp_path):
    records = json.loads((validated.folder / "val.json").read_text())
    (tmp_path / "val.json").write_text(
        json.dumps([*records, {"image_id": "lost", "caption": "No file has this name."}])
    )
    options = ("run.valid_splits=[val]", "run.iters_per_epoch=2", "run.max_bad_share=0.6")
    options += (
        f"datasets.cc_sbu_align.build_info.val_ann_path={tmp_path}/val.json",
        f"run.output_dir={tmp_path}/output",
    )
    warm.train(validated, *options)
    (run,) = (tmp_path / "output").iterdir()
    noted = [(run / name).read_text() for name in ("log.txt", "bad_samples.jsonl")]
    assert [len(text.splitlines()) for text in noted] == [4, 2]
    card = card_path(run / "checkpoint_1.pth")  # as a kill between the log and the card leaves it
    facts = json.loads(card.read_text())
    del facts["valid_loss"]
    card.write_text(json.dumps(facts))
    warm.train(validated, *options, AUTO)
    assert "valid_loss" in json.loads(card.read_text())
    assert [(run / name).read_text() for name in ("log.txt", "bad_samples.jsonl")] == noted


def edited(*at, to):
    """An edit of the content of a checkpoint."""

    def edit(content):
        for key in at[:-1]:
            content = content[key]
        content[at[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "entry"),
    [
        (edited("model", "llama_proj.weight", to=torch.ones(96, 48) * torch.nan), "llama_proj.weight"),
        (edited("model", to=[1]), "'model'"),
        (edited("optimizer", to="adamw"), "optimizer"),
        (edited("optimizer", "param_groups", 0, "betas", to=[0.9]), "optimizer.param_groups[0].betas"),
        (edited("optimizer", "state", 0, "exp_avg", to=torch.ones(3)), "optimizer.state.0.exp_avg"),
        (edited("optimizer", "state", 1, to=7), "optimizer.state.1"),
        (edited("epoch", to="one"), "epoch"),
        (edited("state", "position", "iteration", to=2.5), "state.position.iteration"),
        (edited("state", "position", "epoch", to=-3), "state"),
        (edited("state", "ranks", to=[]), "state"),
        (edited("state", "ranks", 0, "rng", "torch", to=torch.ones(4)), "state.ranks[0].rng.torch"),
        (edited("state", "ranks", 0, "data", "iteration", to="4"), "state.ranks[0].data.iteration"),
        (edited("state", "ranks", 0, "finite", to={}), "state.ranks[0].finite"),
        (edited("state", "ranks", 0, "log", to={"loss": [1]}), "state.ranks[0].log"),
    ],
)
def test_a_damaged_entry_is_named(edit, entry, stopped, building, tmp_path):
    checkpoint, runner = stopped
    content = torch.load(checkpoint, weights_only=True)
    edit(content)
    path = tmp_path / "edited.pth"
    torch.save(content, path)
    runner.run = replace(runner.run, resume_ckpt_path=str(path))
    before = building.trained(runner)
    with pytest.raises(WeightsError) as error:
        runner.resume()
    assert str(error.value).startswith(str(path))
    assert entry in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in building.trained(runner).items())


@pytest.fixture(scope="module")
def stopped(warm, make, building):
    """A checkpoint in the middle of an epoch, and a runner that is to go on from copies of it."""
    tiny = make("json")
    warm.train(tiny, "run.save_every_iters=4", "run.max_epoch=1")
    (run,) = tiny.runs()
    return run / "checkpoint_iter_4.pth", building.build(tiny.recipe)
