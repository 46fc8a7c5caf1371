"""A run that goes on from a checkpoint repeats the uninterrupted run bit for bit."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from minigpt4.common.checkpoint import card_path
from minigpt4.common.errors import WeightsError

STEPS = 14
EPOCH = 7


@dataclass(frozen=True)
class Case:
    """What a run is like."""

    kind: str
    workers: int
    processes: int = 1
    accum: int = 1
    options: tuple[str, ...] = field(default=())

    def start(self) -> tuple[str, ...]:
        return (f"run.num_workers={self.workers}", f"run.accum_grad_iters={self.accum}", *self.options)


MEAN, SUM = ("run.accum_loss=mean",), ("run.accum_loss=sum",)
CASES = {
    "json": Case("json", 0),
    "json, 2 workers, sum": Case("json", 2, accum=3, options=SUM),
    "shards, mean": Case("shards", 0, accum=3, options=MEAN),
    "shards, 2 workers": Case("shards", 2, options=("run.max_grad_norm=0.1",)),
    "mixed, fp16, sum": Case("mixed", 0, accum=3, options=(*SUM, "run.amp=True")),
    "2 processes, json, 2 workers": Case("json", 2, 2),
    "2 processes, json, sum": Case("json", 0, 2, 3, SUM),
    "2 processes, shards, 2 workers, mean": Case("shards", 2, 2, 3, MEAN),
    "2 processes, mixed, 2 workers, sum": Case("mixed", 2, 2, 3, SUM),
}


@pytest.fixture(scope="module", params=CASES)
def whole(request, warm, make):
    """An uninterrupted run that saved after every iteration: (tiny, case, its folder)."""
    case = CASES[request.param]
    tiny = make(case.kind)
    warm.train(tiny, *case.start(), "run.save_every_iters=1", processes=case.processes)
    (run,) = tiny.runs()
    return tiny, case, run


def _of_case(run: Path, step: int) -> Path:
    return run / (f"checkpoint_{step // EPOCH - 1}.pth" if step % EPOCH == 0 else f"checkpoint_iter_{step}.pth")


@pytest.mark.parametrize("step", [4, 7])
def test_resume_from_a_path_repeats_the_rest_in_a_new_folder(step, whole, warm, tools, tmp_path):
    tiny, case, run = whole
    options = (f"run.resume_ckpt_path={_of_case(run, step)}", f"run.output_dir={tmp_path}")
    warm.train(tiny, *case.start(), *options, processes=case.processes)
    (resumed,) = tmp_path.iterdir()
    assert tools["logged"](resumed) == tools["logged"](run)[step:]
    assert (resumed / "log.txt").read_text().splitlines() == (run / "log.txt").read_text().splitlines()[step // EPOCH :]
    assert tools["alike"](tools["final"](resumed), tools["final"](run))


def test_auto_goes_on_in_the_same_folder_and_logs_every_step_once(whole, warm, tools, tmp_path):
    tiny, case, run = whole
    copy = shutil.copytree(run, tmp_path / run.name)
    for path in [*copy.glob("checkpoint_iter_1[0-3].*"), *copy.glob("checkpoint_1.*")]:
        path.unlink()
    warm.train(tiny, *case.start(), "run.resume_ckpt_path=auto", f"run.output_dir={tmp_path}", processes=case.processes)
    assert list(tmp_path.iterdir()) == [copy]
    assert [step for step, _, _ in tools["logged"](copy)] == list(range(STEPS))
    assert tools["logged"](copy) == tools["logged"](run)
    assert (copy / "log.txt").read_text() == (run / "log.txt").read_text()
    assert tools["alike"](tools["final"](copy), tools["final"](run))


def test_data_of_the_case_has_bad_samples(whole, tools):
    _, _, run = whole
    state = tools["final"](run)["state"]["ranks"][0]["data"]["counts"]
    assert all(bad > 0 for _, bad in state.values())


AUTO = "run.resume_ckpt_path=auto"


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
    tiny, checkpoint = stopped
    content = torch.load(checkpoint, weights_only=True)
    edit(content)
    path = tmp_path / "edited.pth"
    torch.save(content, path)
    runner = building.build(tiny.recipe, f"run.resume_ckpt_path={path}", f"run.output_dir={tmp_path}")
    before = building.trained(runner)
    with pytest.raises(WeightsError) as error:
        runner.resume()
    assert str(error.value).startswith(str(path))
    assert entry in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in building.trained(runner).items())


@pytest.fixture(scope="module")
def stopped(warm, make):
    """A checkpoint in the middle of an epoch: (tiny, its path)."""
    tiny = make("json")
    warm.train(tiny, "run.save_every_iters=4", "run.max_epoch=1")
    (run,) = tiny.runs()
    return tiny, run / "checkpoint_iter_4.pth"
