"""What a model can be loaded from: YAML files and folders of runs."""

import logging

import pytest
import torch

from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, WeightsError
from minigpt4.common.run_folder import RunFolder
from minigpt4.inference.pipeline import read_source


@pytest.fixture
def run(tmp_path, config):
    """The folder of a run with two checkpoints."""
    folder = RunFolder.create(tmp_path / "runs")
    folder.describe(read_source(config, ["model.ckpt=start.pth"]).merged, seed=42, world_size=1)
    for iteration in (5, 10):
        _save(folder.path / f"checkpoint_{iteration}.pth", iteration)
    return folder.path


def _save(path, iteration):
    save_checkpoint(path, {"model": {"w": torch.zeros(9)}}, {"iteration": iteration, "run_started": "2026-01-01"})


def test_yaml_gives_its_configuration_with_options_over_it(config):
    changed = read_source(str(config), ["model.ckpt=other.pth", "run.generation.num_beams=2"])
    assert (changed.model.ckpt, changed.run.generation.num_beams) == ("other.pth", 2)
    assert read_source(config, "run.seed=7").run.seed == 7


def test_run_gives_its_configuration_and_its_newest_checkpoint(run, config, caplog):
    with caplog.at_level(logging.INFO):
        found = read_source(run)
    assert found.model.ckpt == str(run / "checkpoint_10.pth")
    assert found.model.prompt_template == read_source(config).model.prompt_template
    assert "taking its checkpoint checkpoint_10.pth" in caplog.text


def test_best_checkpoint_goes_before_the_newest_if_it_is_whole(run):
    best = run / "checkpoint_best.pth"
    _save(best, 5)
    assert read_source(run).model.ckpt == str(best)
    best.write_bytes(b"half")
    assert read_source(run).model.ckpt == str(run / "checkpoint_10.pth")


def test_option_for_the_checkpoint_goes_over_the_runs_own(run):
    assert read_source(run, ["model.ckpt=other.pth", "run.seed=7"]).model.ckpt == "other.pth"
    assert read_source(run, ["run.seed=7"]).run.seed == 7


def test_run_without_a_whole_checkpoint_is_an_error(run):
    for file in run.glob("*.pth"):
        file.write_bytes(b"half")
    with pytest.raises(WeightsError, match=f"{run}: the run has no whole checkpoint"):
        read_source(run)


def test_folder_that_is_no_run_is_an_error_that_names_the_last_run_in_it(run, tmp_path):
    with pytest.raises(ConfigError, match=rf"{run.parent}: is not the folder of a run.*the last of the 1 runs.*{run}"):
        read_source(run.parent)
    with pytest.raises(ConfigError, match=r"is not the folder of a run, for it has no run\.json$"):
        read_source(tmp_path)


@pytest.mark.parametrize("content", ['{"seed": 42}', "{"])
def test_broken_run_json_is_an_error_that_names_it(run, content):
    (run / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_source(run)


def test_source_that_is_missing_or_holds_weights_says_what_it_should_be(run, tmp_path):
    with pytest.raises(ConfigError, match="nothing.yaml: no such file"):
        read_source(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match=r"checkpoint_5\.pth: is a weights file; name its YAML"):
        read_source(run / "checkpoint_5.pth")


def test_commands_take_the_configuration_of_a_run_by_its_run_json(run, config):
    class Arguments:
        cfg_path = str(run / "run.json")
        options = None

    expected = read_source(config, ["model.ckpt=start.pth"]).merged
    assert Config(Arguments).to_dict() == expected
