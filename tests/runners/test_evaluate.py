"""`run.evaluate` and `run.test_splits`: checkpoints measured by `train.py`, alone and after the last epoch."""

import json
import shutil
from pathlib import Path

import pytest

from minigpt4.check import check
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.evaluation import METRICS

EVALUATE = ("run.evaluate=True", "run.test_splits=[test]")
TRAIN = ("run.valid_splits=[val]", "run.test_splits=[test]", "run.max_epoch=3", "run.iters_per_epoch=2")


@pytest.fixture(scope="module")
def tested(validated, tmp_path_factory):
    """The recipe with validation samples, whose dataset also has a test split: 4 other samples."""
    folder = tmp_path_factory.mktemp("tested")
    tiny = type(validated)(folder, folder / "recipe.yaml")
    shutil.copytree(validated.folder / "cc_sbu_align", folder / "cc_sbu_align")
    shutil.copy(validated.folder / "val.json", folder)
    captions = [record["caption"] for record in json.loads((folder / "val.json").read_text())]
    records = [{"image_id": str(n), "caption": captions[n % 4]} for n in range(4, 8)]
    (folder / "test.json").write_text(json.dumps(records))
    recipe = validated.recipe.read_text().replace(str(validated.folder), str(folder))
    tiny.recipe.write_text(recipe.replace("val_ann_path", f"test_ann_path: {folder}/test.json, val_ann_path"))
    return tiny


def log_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]


def of_test(run: Path) -> dict:
    """The only line of `log.txt` about the test split."""
    (line,) = [line for line in log_lines(run) if "test_loss" in line]
    return line


def checkpoints(output: Path) -> dict[Path, float]:
    """Every checkpoint and card, and when it was written."""
    return {path: path.stat().st_mtime for path in output.glob("*/checkpoint_*")}


@pytest.fixture(scope="module")
def trained(tested, warm):
    """Folder of a run that was validated and then tested; its rate makes the later epochs worse."""
    output = tested.folder / "trained"
    rates = ("run.lr_sched=linear_warmup_step_lr", "run.warmup_steps=0", "run.warmup_lr=-1", "run.init_lr=0.01")
    warm.train(tested, *TRAIN, *rates, f"run.output_dir={output}")
    (run,) = output.iterdir()
    return run


def test_training_ends_with_the_test_splits_on_its_best_checkpoint_once(tested, trained, warm, tmp_path):
    losses = [line["val_loss"] for line in log_lines(trained) if "val_loss" in line]
    best = losses.index(min(losses))
    assert best < 2, "or the last weights would do"
    line = of_test(trained)
    assert line["epoch"] == best
    checkpoint = f"run.resume_ckpt_path={trained}/checkpoint_{best}.pth"
    warm.train(tested, *EVALUATE, f"run.output_dir={tmp_path}", checkpoint)
    (alone,) = tmp_path.iterdir()
    assert of_test(alone) == line
    assert json.loads((trained / "checkpoint_best.json").read_text())["tested"] == {"test": {"loss": line["test_loss"]}}
    before = (trained / "log.txt").read_text()
    warm.train(tested, *TRAIN, f"run.output_dir={trained.parent}", "run.resume_ckpt_path=auto")
    assert (trained / "log.txt").read_text() == before


def test_evaluation_of_auto_leaves_the_run_as_it_is_and_needs_no_training_data(tested, trained, warm, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(trained.parent, output)
    before, log = checkpoints(output), (trained / "log.txt").read_text()
    hidden = tested.folder / "cc_sbu_align" / "filter_cap.json"
    hidden.rename(tmp_path / "hidden.json")
    try:
        result = warm.train(tested, *EVALUATE, f"run.output_dir={output}", "run.resume_ckpt_path=auto")
    finally:
        (tmp_path / "hidden.json").rename(hidden)
    assert "checkpoint_2.pth" in result.text()
    assert checkpoints(output) == before
    assert (output / trained.name / "log.txt").read_text() == log
    (new,) = [run for run in output.iterdir() if run.name != trained.name]
    assert sorted(path.name for path in new.iterdir()) == ["in_use.lock", "log.txt", "run.json"]
    assert of_test(new)["epoch"] == 2


def test_model_ckpt_is_evaluated_alike_by_one_and_two_processes_with_and_without_a_cache(tested, warm, tmp_path):
    lines = []
    for name, processes, more in (("alone", 1, ()), ("two", 2, ("{cache}",)), ("known", 1, ("{cache}",))):
        cache = [f"run.feature_cache={tmp_path}/cache" for _ in more]
        options = (*EVALUATE, "run.valid_captions=4", f"run.output_dir={tmp_path}/{name}", *cache)
        result = warm.train(tested, *options, processes=processes)
        (run,) = (tmp_path / name).iterdir()
        assert checkpoints(tmp_path / name) == {}
        lines.append(of_test(run))
    assert lines[1] == pytest.approx(lines[0], rel=1e-5)
    assert lines[2] == pytest.approx(lines[0], rel=1e-5)
    scores = [lines[0][f"test_{name}"] for name in METRICS]
    assert max(scores) > 0, scores
    assert "loading the vision encoder now" not in result.text()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["run.evaluate=True"], "run.test_splits"),
        (["run.evaluate=True", "run.test_splits=[tset]"], "run.test_splits"),
        ([*EVALUATE, "run.resume_ckpt_path=auto", "run.output_dir=nothing"], "run.resume_ckpt_path"),
        ([*EVALUATE, "datasets.cc_sbu_align.batch_size=null"], "batch_size"),
    ],
)
def test_nothing_to_evaluate_is_an_error(options, key, tested, warm):
    result = warm.start(tested, *options)
    assert result.wait() == [2]
    assert key in result.text().splitlines()[-1]


def test_check_says_what_would_be_evaluated(tested):
    class Arguments:
        cfg_path, options = str(tested.recipe), list(EVALUATE)

    report = check(Config(Arguments()))
    assert "minigpt4_tiny.pth is evaluated on test of cc_sbu_align" in report
    assert "updates" not in report
    Arguments.options = ["run.evaluate=True"]
    with pytest.raises(ConfigError, match=r"run\.test_splits"):
        check(Config(Arguments()))
