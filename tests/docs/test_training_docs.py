"""What docs/training.md and the reference curves say is so."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4.common.config import Config
from minigpt4.common.optims import LinearWarmupCosineLRScheduler

REPOSITORY = Path(__file__).parents[2]
TRAINING = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
CURVES = REPOSITORY / "docs/reference_curves"
RECIPES = {"stage1": "stage1_pretrain", "stage2": "stage2_finetune", "flickr30k": "flickr_finetune"}


def _experiment(recipe: Path, options: list[str] | None = None):
    return Config(SimpleNamespace(cfg_path=str(recipe), options=options)).validate()


def _rows(name: str) -> list[dict[str, str]]:
    with (CURVES / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.mark.parametrize("row", _rows("learning_rates.csv"), ids=lambda row: f"{row['recipe']}-{row['step']}")
def test_published_rate_is_the_rate_of_the_recipe(row):
    run = _experiment(REPOSITORY / f"train_configs/minigpt4_{RECIPES[row['recipe']]}.yaml").run
    schedule = LinearWarmupCosineLRScheduler(
        None, run.max_epoch, run.iters_per_epoch, run.min_lr, run.init_lr, run.warmup_steps, run.warmup_lr
    )
    rate = schedule.lr_at(*divmod(int(row["step"]), run.iters_per_epoch))
    assert f"{rate:.3e}".replace("e-0", "e-") == row["lr"]


def test_every_curve_is_explained():
    readme = (CURVES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+\.csv)`", readme, re.MULTILINE)) == {path.name for path in CURVES.glob("*.csv")}


def test_curves_are_numbers():
    for path in CURVES.glob("*.csv"):
        rows = _rows(path.name)
        assert rows
        assert all(float(value) >= 0 for row in rows for name, value in row.items() if name != "recipe"), path


def test_flickr30k_losses_agree_in_text_and_curve():
    losses = [row["train_loss"] for row in _rows("flickr30k_7b_epochs.csv")]
    assert f"epochs {', '.join(losses)}" in TRAINING


def test_files_and_recipes_that_the_text_names_are_there():
    named = re.findall(r"(?:^|[\s`])((?:train_configs|scripts)/[\w./]+\.(?:yaml|py|sh)|\w+\.py)\b", TRAINING)
    assert len(set(named)) >= 8
    assert [name for name in sorted(set(named)) if not (REPOSITORY / name).exists()] == []


def test_run_keys_that_the_text_names_are_keys():
    run = _experiment(REPOSITORY / "train_configs/minigpt4_stage2_finetune.yaml").run
    keys = set(re.findall(r"\brun\.(\w+)(?!\.json)\b", TRAINING)) - {"json"}
    assert len(keys) >= 15
    assert [key for key in sorted(keys) if not hasattr(run, key)] == []


def test_default_places_of_the_data_are_those_of_the_text():
    for name in RECIPES.values():
        for dataset in _experiment(REPOSITORY / f"train_configs/minigpt4_{name}.yaml").datasets.values():
            place = dataset.build_info.storage or dataset.build_info.ann_path.split("/")[0]
            assert f"`{place}" in TRAINING
