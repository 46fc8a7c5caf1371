"""The reference's training runs through the real runner: every step, its logs, its checkpoints."""

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from minigpt4.models.loading import PUBLISHED_BUFFERS
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask

GOLDEN = json.loads((Path(__file__).parents[1] / "data/parity/golden.json").read_text())
RUNS = {run["name"]: run for run in GOLDEN["train"]["runs"]}
PROJECTION = ("llama_proj.weight", "llama_proj.bias")
ATOL = 2e-5
FIRST_EPOCH = "train_main_checkpoint_0.pth"
PUBLISHED_ENTRIES = {"model", "optimizer", "config", "scaler", "epoch"}


class GoldenTask(ImageTextPretrainTask):
    """Gives the model the prompt that the reference drew, and notes the weights before each step."""

    def __init__(self) -> None:
        self.norms: list[list[float]] = []

    def train_step(self, model, samples):
        model.prompt_list = [samples["prompt"]]
        trained = model.trainable_parameters()
        self.norms.append([trained[name].detach().double().norm().item() for name in PROJECTION])
        return super().train_step(model, samples)


@dataclass
class Replay:
    """A run of ours on the reference's batches."""

    name: str
    runner: RunnerBase
    norms: list[list[float]]
    groups: list[dict]
    """Parameter groups before the first step, parameters by name."""

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.runner.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def golden(self) -> dict:
        return RUNS[self.name]


def _recipe(golden: dict, tiny, parity: Path) -> Path:
    """The tiny recipe with the run's own settings."""
    recipe = yaml.safe_load(tiny.recipe.read_text())
    recipe["model"] |= {
        "has_qformer": golden["has_qformer"],
        "ckpt": str(parity / golden["init_ckpt"]),
        "max_txt_len": GOLDEN["train"]["max_txt_len"],
        "truncate_end_sym": True,
    }
    resume = golden["run"]["resume_ckpt_path"]
    recipe["run"] = golden["run"] | {
        "accum_loss": "sum",
        "log_freq": 1,
        "output_dir": str(tiny.output),
        "resume_ckpt_path": resume and str(parity / resume),
    }
    tiny.recipe.write_text(yaml.safe_dump(recipe))
    return tiny.recipe


def _batches(tensors: dict[str, torch.Tensor]) -> list[dict]:
    """The reference's batches, each with the prompt that it drew."""
    train = GOLDEN["train"]
    prompts = [train["prompt_template_arg"].format(prompt) for prompt in train["prompts_filtered"]]
    return [
        {
            "image": torch.stack([tensors[f"images/img{index}/train"] for index in entry["image_pool_index"]]),
            "answer": entry["answers"],
            "image_id": entry["image_pool_index"],
            "prompt": prompts[entry["prompt_choice"]],
        }
        for entry in train["batches"]
    ]


def _groups(runner: RunnerBase) -> list[dict]:
    names = {id(p): name for name, p in runner.parameters.items()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in runner.optimizer.param_groups]


@pytest.fixture(scope="module")
def replays(building, tools, parity_dir, golden_tensors, tmp_path_factory):
    """Runs by name, each made once."""
    made: dict[str, Replay] = {}

    def replay(name: str) -> Replay:
        if name not in made:
            tiny = tools["make_tiny"](tmp_path_factory.mktemp(name), parity_dir, 1)
            recipe, task = _recipe(RUNS[name], tiny, parity_dir), GoldenTask()
            given = building.fed(_batches(golden_tensors)[RUNS[name]["first_batch"] :])
            runner = building.build(recipe, runner=given, task=task)
            made[name] = Replay(name, runner, task.norms, _groups(runner))
            assert runner.train()
        return made[name]

    return replay


@pytest.fixture(scope="module", params=RUNS)
def replay(request, replays) -> Replay:
    return replays(request.param)


def _near(actual, expected: torch.Tensor, *, atol: float = ATOL, rtol: float = 0.0) -> None:
    torch.testing.assert_close(torch.as_tensor(actual, dtype=expected.dtype), expected, atol=atol, rtol=rtol)


def test_every_step_and_the_end_are_the_references(replay, golden_tensors):
    golden = {name: golden_tensors[f"train/{replay.name}/{name}"] for name in ("loss", "lr", "weight_norm_before_step")}
    _near([line["loss"] for line in replay.metrics], golden["loss"])
    _near([line["lr"] for line in replay.metrics], golden["lr"], atol=0, rtol=1e-12)
    _near(replay.norms, golden["weight_norm_before_step"])
    for name, tensor in replay.runner.model.trainable_parameters().items():
        _near(tensor.detach(), golden_tensors[f"train/{replay.name}/final_{name.replace('.', '_')}"])


def test_parameter_groups_at_the_start_are_the_references(replay):
    expected = replay.golden["param_groups_at_start"]
    found = [{key: group[key] for key in want} for group, want in zip(replay.groups, expected, strict=True)]
    assert [{**group, "betas": list(group["betas"])} for group in found] == expected


def test_log_txt_holds_the_references_means(replay):
    lines = [json.loads(line) for line in (replay.runner.folder / "log.txt").read_text().splitlines()]
    expected = replay.golden["log_txt"]
    assert [{key: line[key] for key in want} for line, want in zip(lines, expected, strict=True)] == expected


# Checkpoints


@pytest.fixture(scope="module")
def saved(replays) -> dict:
    """Our checkpoint after the first epoch."""
    return torch.load(replays("main").runner.folder / "checkpoint_0.pth", weights_only=True)


def test_checkpoint_has_the_published_entries_and_weights_and_one_for_exact_resume(saved, parity_dir):
    published = torch.load(parity_dir / FIRST_EPOCH, weights_only=True)["model"]
    assert set(saved) == PUBLISHED_ENTRIES | {"state"}
    assert (saved["epoch"], saved["scaler"]) == (0, None)
    buffers = {name for name in published for like in PUBLISHED_BUFFERS if fnmatch.fnmatchcase(name, like)}
    assert set(published) - buffers == set(saved["model"]) == set(PROJECTION)
    for name, tensor in saved["model"].items():
        assert tensor.dtype == published[name].dtype
        _near(tensor, published[name])
    assert set(saved["config"]) >= {"model", "datasets", "run"}
    assert saved["config"]["run"]["init_lr"] == RUNS["main"]["run"]["init_lr"]
    assert set(GOLDEN["checkpoints"][FIRST_EPOCH]["config_keys"]["run"]) <= set(saved["config"]["run"])


def test_optimizer_state_has_the_published_layout_and_numbers(saved, parity_dir):
    ours, theirs = saved["optimizer"], torch.load(parity_dir / FIRST_EPOCH, weights_only=True)["optimizer"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert ours["state"][index].keys() == state.keys()
        for key, tensor in state.items():
            _near(ours["state"][index][key], tensor, atol=1e-5)
    for group, want in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        equal = want.keys() - {"fused", "foreach", "lr"}
        assert {key: group[key] for key in equal} == {key: want[key] for key in equal}
        assert group["lr"] == pytest.approx(want["lr"], rel=1e-12)
        assert want.keys() <= group.keys()
