"""A run that goes on from a checkpoint repeats the uninterrupted run bit for bit."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

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
