"""`scripts/ablate.py`: a plan, killed and resumed or two jobs at once, gives one table; refusals name the place."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minigpt4.ablation import Stage, Study, read_plan
from minigpt4.evaluation.bootstrap import t_interval
from minigpt4.evaluation.study import results_table, summarise
from minigpt4.mini.llava import write_clip

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "ablate.py"
TABLES = ("table.md", "table.tex", "table.csv", "table.json", "table.png")
PLAN = """
base: {stage1: recipe.yaml, stage2: recipe.yaml}
options: [run.max_epoch=1, run.save_every_iters=2]
rows:
  default: {published: {score: 58.2}}
  only stage 1: {without: [stage2]}
  broken:
    options: [model.max_context_len=3000]
    without: [stage2]
    values: {file: broken.json}
seeds: [0, 1]
values: {file: scores.json}
evaluate:
  loss: ['python score.py {checkpoint} {output} {seed} {options}', 'python check.py {output}/{file}']
columns:
  score: {file: loss/scores.json, key: checkpoints.*.scores.0, interval: checkpoints.*.interval, digits: 1, scale: 100}
"""
SHARED = PLAN.replace("    options: [model.max_context_len=3000]\n", "")
"""Its rows need four runs."""
SCORE = """
import json, sys
from pathlib import Path
checkpoint, output, seed, *options = sys.argv[1:]
share = json.loads(Path(checkpoint).with_name("metrics.jsonl").read_text().splitlines()[-1])["loss"] / 10
scores = {"scores": [share], "interval": [share - 0.1, share + 0.1], "options": options}
Path(output, "scores.json").write_text(json.dumps({"checkpoints": {"model": scores}}))
"""
CHECK = """
import sys
from pathlib import Path
if not Path(sys.argv[1]).exists():
    sys.exit(f"error: {Path(sys.argv[1]).name} is not there")
"""


class Place:
    """A folder with a plan, its data and its results."""

    def __init__(self, folder: Path, recipe: Path, warm: Any, plan: str) -> None:
        self.folder, self.warm = folder, warm
        recipe.write_text(recipe.read_text().replace(str(folder), "."))
        for name, text in (("plan.yaml", plan), ("score.py", SCORE), ("check.py", CHECK)):
            (folder / name).write_text(text)

    def start(self, *options: str) -> Any:
        """The command in the background, whose children are processes of their own."""
        return self.warm.script(SCRIPT, "plan.yaml", "--output", "out", *options, cwd=self.folder, apart=True)

    def run(self, *options: str) -> tuple[int, str, str]:
        """Exit status and both streams."""
        run = self.start(*options)
        return run.wait()[0], run.out.read_text(), run.text()

    def tables(self) -> dict[str, str]:
        return {name: hashlib.sha256((self.folder / "out/plan" / name).read_bytes()).hexdigest() for name in TABLES}

    def done(self) -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in sorted(self.folder.glob("out/*/*/done.json"))}

    def content(self) -> dict[str, Any]:
        return json.loads((self.folder / "out/plan/table.json").read_text())


@pytest.fixture(scope="module")
def ablate(load_script) -> ModuleType:
    return load_script("scripts/ablate.py")


@pytest.fixture(scope="module")
def place_in(load_script, parity_dir, warm) -> Callable[..., Place]:
    """`place_in(folder, plan)`"""
    runs = load_script("tests/runners/conftest.py")
    return lambda folder, plan: Place(folder, runs.make_tiny(folder, parity_dir).recipe, warm, plan)


@pytest.fixture(scope="module")
def calm(tmp_path_factory, place_in) -> tuple[Place, int]:
    """Two jobs at once, never disturbed; and the exit status."""
    place = place_in(tmp_path_factory.mktemp("calm"), SHARED)
    return place, place.run("--jobs", "2")[0]


@pytest.mark.timeout(1200)
def test_a_study_that_was_killed_again_and_again_ends_with_the_same_bytes(calm, tmp_path, place_in):
    place, seed = place_in(tmp_path / "killed", SHARED), ("--seeds", "0")
    for sign in ("runs/stage1-*/output.txt", "runs/stage2-*/*/checkpoint_iter_2.pth"):
        run = place.start(*seed)
        while not list(place.folder.glob(f"out/{sign}")):
            assert run.alive(), run.text()
            time.sleep(0.01)
        run.kill()
        before = place.done()
    status, _, errors = place.run(*seed)
    assert status == 1, errors[-2000:]
    assert place.done().items() >= before.items()  # nothing that was done is done again
    assert before
    undisturbed = place_in(tmp_path / "undisturbed", SHARED)
    shutil.copytree(calm[0].folder / "out", undisturbed.folder / "out")
    assert undisturbed.run(*seed)[0] == 1
    assert place.tables() == undisturbed.tables()


def test_rows_share_their_stages_and_a_row_that_fails_says_so(calm):
    place, status = calm
    assert status == 1
    assert sorted(folder.name.split("-")[0] for folder in (place.folder / "out/runs").iterdir()) == [
        *["stage1"] * 2,  # of all three rows, with two seeds
        *["stage2"] * 2,
    ]
    assert all(len(list(folder.glob("*/run.json"))) == 1 for folder in (place.folder / "out/runs").iterdir())
    default, only, broken = place.content()["rows"]
    assert (default["state"], only["state"], broken["state"]) == ("", "", "failed")
    assert [text.split(" (log")[0] for text in broken["failures"]] == [
        f"loss, seed {seed}: exit status 1: error: broken.json is not there" for seed in (0, 1)
    ]
    assert broken["values"] == {"score": [None, None]}
    assert default["stages"]["stage1"] == only["stages"]["stage1"]
    assert list(only["stages"]) == ["stage1"]
    assert (default["parameters"], default["tokens"]) == (4704, 8)
    assert default["stages"]["stage2"]["steps"] == 10
    text = (place.folder / "out/plan/table.md").read_text()
    assert "| broken | 0 | - | - | failed |" in text
    assert "58.2 |" in text.splitlines()[4]


def test_the_same_command_retries_what_failed_and_nothing_else(calm, tmp_path):
    place, before = calm[0], calm[0].done()
    plan = place.folder / "plan.yaml"
    plan.write_text(SHARED.replace("file: broken.json", "file: ./scores.json"))
    try:
        status, said, errors = place.run()
        assert status == 0, said + errors
        assert len(place.done().keys() - before.keys()) == 2  # with other commands it is another evaluation
        assert place.done().items() >= before.items()
        assert place.content()["rows"][2]["state"] == ""
        _, dry, _ = place.run("--dry-run", "--only", "broken")
        assert dry.count(": done") == 4
        assert "train.py" not in dry
    finally:
        plan.write_text(SHARED)


@pytest.fixture
def place(tmp_path, monkeypatch, place_in) -> Place:
    monkeypatch.chdir(tmp_path)
    return place_in(tmp_path, PLAN)


def test_a_dry_run_shows_commands_and_what_is_missing_and_does_nothing(ablate, place, capsys):
    (place.folder / "check.py").unlink()
    assert ablate.main(["plan.yaml", "--output", "out", "--seeds", "7", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("train.py") == 3
    assert "stage1, seed 7 (default, only stage 1): step 0 of 10\n" in said
    assert "run.seed=7 run.output_dir=out/runs/stage2-" in said
    assert "model.ckpt=out/runs/stage1-" in said
    assert "score.py out/runs/stage2-" in said
    assert "7 model.max_context_len=3000\n" in said  # {options}
    assert "and 6 of which none like it was measured yet" in said
    assert "missing: plan.yaml: evaluate.loss: check.py does not exist" in said
    assert not (place.folder / "out").exists()
    assert ablate.main(["plan.yaml", "--output", "out"]) == 2
    assert "evaluate.loss: check.py does not exist" in capsys.readouterr().err


def test_commands_for_a_scheduler_are_one_for_each_row_and_seed(ablate, place, capsys):
    assert ablate.main(["plan.yaml", "--commands", "--only", "default", "broken"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("plan.yaml --output output/ablations --only default --seeds 0")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rows:", "rowz:", "rowz: unknown key; did you mean 'rows'?"),
        ("{without: [stage2]}", "{witout: [stage2]}", "rows.only stage 1.witout: unknown key"),
        ("{without: [stage2]}", "{without: [stage3]}", "rows.only stage 1.without: unknown name 'stage3'"),
        ("{without: [stage2]}", "{without: [stage2, stage1]}", "rows.only stage 1.without: leaves no stage"),
        ("published: {score", "published: {scores", "rows.default.published: unknown name 'scores'; did you mean"),
        ("run.max_epoch=1,", "run.seed=1,", "options: run.seed=1: is set for each run"),
        ("run.max_epoch=1,", "run.max_epok=1,", "rows.default, stage1: recipe.yaml:\n  - --options run.max_epok: unk"),
        ("stage2: recipe.yaml", "stage2: recip.yaml", "rows.default, stage2: recip.yaml: no such file"),
        ("python score.py {checkpoint}", "python score.py {chekpoint}", "evaluate.loss: {chekpoint} is unknown; did"),
        ("python score.py", "python scores.py", "evaluate.loss: scores.py does not exist"),
        ("file: loss/", "file: lost/", "columns.score.file: unknown name 'lost'; did you mean 'loss'?"),
        ("digits: 1", "digits: -1", "columns.score.digits: -1"),
        ("seeds: [0, 1]", "seeds: []", "seeds: []"),
    ],
)
def test_refusals_name_plan_and_key(ablate, place, capsys, old, new, said):
    assert old in PLAN
    (place.folder / "plan.yaml").write_text(PLAN.replace(old, new))
    assert ablate.main(["plan.yaml", "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: plan.yaml")
    assert said in error
    assert not (place.folder / "out").exists()


def test_an_unknown_row_is_refused(ablate, place, capsys):
    assert ablate.main(["plan.yaml", "--only", "defualt"]) == 2
    assert "plan.yaml: --only defualt: unknown row; did you mean 'default'?" in capsys.readouterr().err


def test_a_stage_is_known_by_all_that_it_depends_on(place):
    plan = read_plan(Path("plan.yaml"))
    cells = Study(Path("plan.yaml"), plan, [0, 1], Path("out")).cells
    first, second, evaluation = cells["default", 0]
    assert cells["only stage 1", 0][0] is first
    keys = {job.key for cell in cells.values() for job in cell if isinstance(job, Stage)}
    assert len(keys) == 6
    assert first.hash_of(None) == cells["default", 1][0].hash_of(None)
    (place.folder / "plan.yaml").write_text(PLAN.replace("stage1: recipe", "warmup: recipe"))
    plan.rows["default"].stages = {"stage1": ["run.init_lr=1e-3"]}
    changed = Study(Path("plan.yaml"), plan, [0], Path("out")).cells["default", 0]
    assert all(one.key != other.key for one, other in zip(changed, (first, second, evaluation), strict=True))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The repository with the tower that the quickstart writes."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in REPOSITORY.iterdir():
        if entry.name not in ("data", "output"):
            (folder / entry.name).symlink_to(entry)
    write_clip(folder / "data/mini/clip")
    return folder


@pytest.mark.parametrize(
    "plan", sorted((REPOSITORY / "train_configs/ablations").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_plans_can_be_read(plan, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    read = read_plan(plan)
    study = Study(plan, read, read.seeds[:1], Path("out"))
    assert len(study.cells) == len(read.rows) > 1
    assert not {path for path in study.missing if path.startswith(("train_configs", "eval_configs/mini_", "scripts"))}


@pytest.mark.parametrize(
    ("values", "half"),
    [
        ([1.0, 2.0, 3.0], 2.4842),  # s / sqrt(n) = 0.57735, t(2) = 4.3027
        ([0.0, 1.0], 6.3531),  # 0.5 x 12.7062
        ([float(number) for number in range(21)], 2.8243),  # s = 6.2048, t(20) = 2.0860
    ],
)
def test_the_interval_of_a_mean_is_students(values, half):
    low, high = t_interval(values)
    assert (high - low) / 2 == pytest.approx(half, abs=2e-4)
    assert (high + low) / 2 == pytest.approx(sum(values) / len(values))
    assert t_interval(values[:1]) is None


def row(name: str, values: list[float | None], ends: list[Any] | None = None) -> dict[str, Any]:
    intervals = {"score": ends or [None] * len(values)}
    return {"name": name, "values": {"score": values}, "intervals": intervals, "published": {}, "state": ""}


def test_differences_are_paired_by_seed_and_bold_only_where_their_interval_is_clear():
    columns = {"score": {"digits": 2}}
    rows = [row("default", [1.0, 5.0, 9.0]), row("more", [1.5, 5.6, 9.4]), row("noise", [9.0, 1.0, None])]
    content = {"columns": columns, "rows": rows, "summary": summarise(rows, columns)}
    default, more, noise = (cells["score"] for cells in content["summary"])
    assert default["difference"] is None
    assert more["difference"] == pytest.approx(0.5)
    assert more["difference_interval"] == pytest.approx((0.2516, 0.7484), abs=1e-4)  # t(2) x 0.1 / sqrt(3)
    assert (noise["seeds"], noise["difference"], noise["kind"]) == (2, 2.0, "t over seeds")
    cells = [line[2] for line in results_table(content).rows]
    assert [cell.startswith("**") for cell in cells] == [False, True, False]


def test_with_one_seed_the_intervals_are_those_of_the_evaluation_and_it_says_so():
    columns = {"score": {"digits": 2}}
    rows = [row("default", [0.5], [[0.4, 0.6]]), row("better", [0.8], [[0.7, 0.9]]), row("bare", [0.7])]
    default, better, bare = (cells["score"] for cells in summarise(rows, columns))
    assert (default["interval"], default["kind"]) == ([0.4, 0.6], "bootstrap over questions")
    assert better["difference_interval"] == pytest.approx((0.3 - 0.1 * 2**0.5, 0.3 + 0.1 * 2**0.5))
    assert better["difference_kind"] == "of both bootstraps, unpaired"
    assert (bare["difference"], bare["difference_interval"], bare["kind"]) == (pytest.approx(0.2), None, None)


def test_a_result_without_the_column_is_an_error_that_names_both(ablate, calm):
    place = calm[0]
    (place.folder / "plan.yaml").write_text(SHARED.replace("scores.0", "scores.7"))
    try:
        status, _, errors = place.run("--only", "default")
        assert status == 2
        assert "plan.yaml: columns.score: checkpoints.*.scores.7: no '7' in out/evaluations/loss-" in errors
        with pytest.raises(LookupError, match="two"):
            ablate.lookup({"one": [1]}, "one.0.two")
    finally:
        (place.folder / "plan.yaml").write_text(SHARED)
