"""Validation after each epoch: the loss by hand, the best checkpoint, captions, and no trace in the training."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.datasets import EvalLoader, to_device
from minigpt4.evaluation import METRICS, score_captions
from minigpt4.tasks.image_text_pretrain import CAPTION_TOKENS

EPOCHS = 3
LEARNING = ("run.valid_splits=[val]", f"run.max_epoch={EPOCHS}", "run.iters_per_epoch=2", "run.init_lr=0.01")


def _losses(folder: str | Path) -> list[float]:
    """Validation loss by epoch, from `log.txt`."""
    lines = [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line]


def _on_the_cpu(loader: EvalLoader) -> Iterator[dict[str, Any]]:
    """Its batches as the model takes them."""
    return (to_device(batch, torch.device("cpu")) for batch in loader)


def _by_hand(runner, checkpoint: Path) -> float:
    """Mean over all targets of the validation samples, one at a time, with the first prompt."""
    weights = torch.load(checkpoint, weights_only=True)["model"]
    model = runner.model.eval()
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            parameter.copy_(weights[name])
    model.prompt_list = model.prompt_list[:1]
    total = tokens = 0.0
    (loader,) = runner.valid_loaders
    for samples in _on_the_cpu(loader):
        for index, answer in enumerate(samples["answer"]):
            with torch.no_grad():
                output = model({"image": samples["image"][index : index + 1], "answer": [answer]})
            total += output["loss"].item() * output["num_tokens"]
            tokens += output["num_tokens"]
    return total / tokens


@pytest.fixture(scope="module")
def hand(building, validated):
    """`_by_hand` with a model of its own."""
    runner = building.build(validated.recipe, "run.valid_splits=[val]")
    yield lambda checkpoint: _by_hand(runner, checkpoint)
    runner.loader.close()


class Trained:
    """A run of one process with a rate that makes the later epochs worse."""

    def __init__(self, building, recipe: Path) -> None:
        self.runner = building.build(recipe, *LEARNING, *building.CONSTANT_RATE)
        self.modes = []
        self.runner.optimizer.register_step_pre_hook(lambda *_: self.modes.append(self._mode()))
        self.runner.train()
        self.folder = self.runner.folder

    def _mode(self) -> tuple[bool, bool]:
        return self.runner.model.training, self.runner.model.visual_encoder.training


@pytest.fixture(scope="module")
def alone(building, validated) -> Trained:
    return Trained(building, validated.recipe)


def test_loss_is_the_mean_over_all_tokens(alone, hand):
    expected = [hand(alone.folder / f"checkpoint_{epoch}.pth") for epoch in range(EPOCHS)]
    assert _losses(alone.folder) == pytest.approx(expected, rel=1e-6)


def test_loss_of_two_processes_with_uneven_shares_is_the_same_mean(two_ranks, hand):
    ranks = [rank["validation"] for rank in two_ranks]
    assert [rank["seen"] for rank in ranks] == [[2], [1]]
    folder = Path(ranks[0]["folder"])
    expected = [hand(folder / f"checkpoint_{epoch}.pth") for epoch in range(2)]
    assert _losses(folder) == pytest.approx(expected, rel=1e-6)


def test_best_checkpoint_is_that_of_the_best_epoch_and_cards_name_the_losses(alone, tools):
    losses = _losses(alone.folder)
    best = losses.index(min(losses))
    assert best < EPOCHS - 1
    ours = tools["weights"](alone.folder / "checkpoint_best.pth")
    assert tools["same"](ours, tools["weights"](alone.folder / f"checkpoint_{best}.pth"))
    assert json.loads((alone.folder / "checkpoint_best.json").read_text())["best_loss"] == losses[best]
    cards = [json.loads((alone.folder / f"checkpoint_{epoch}.json").read_text()) for epoch in range(EPOCHS)]
    assert [card["valid_loss"] for card in cards] == losses


def test_loss_that_is_not_a_number_is_never_the_best(building, validated):
    runner = building.build(validated.recipe, *LEARNING)
    task, given = runner.task, iter([math.nan, 2.0, math.nan])
    runner.valid_loaders = [list(runner.valid_loaders[0])[:1]]
    task.valid_step = lambda model, samples: {"loss": torch.tensor(next(given)), "num_tokens": 1}
    runner.train()
    assert runner.position.best == 2.0
    assert torch.load(runner.folder / "checkpoint_best.pth", weights_only=True)["epoch"] == 1


def test_validation_leaves_the_training_as_it_is(alone, building, validated, tools):
    assert alone.modes == [(True, False)] * (2 * EPOCHS)  # the frozen parts stay in eval mode
    without = (option for option in LEARNING if "valid_splits" not in option)
    runner = building.build(validated.recipe, *without, *building.CONSTANT_RATE)
    runner.train()
    assert tools["losses"](runner.folder) == tools["losses"](alone.folder)
    assert tools["same"](building.trained(runner), building.trained(alone.runner))


def test_captions_of_validation_images_are_in_the_log(building, validated, caplog):
    runner = building.build(validated.recipe, *LEARNING[:1], "run.max_epoch=1", "run.iters_per_epoch=1")
    with caplog.at_level("INFO"):
        runner.train()
    at = next(n for n, text in enumerate(caplog.messages) if text.startswith("Validation (val): loss: "))
    first, second = caplog.messages[at + 1 : at + 3]
    said = runner.task.caption(runner.model.eval(), next(_on_the_cpu(runner.valid_loaders[0]))["image"])
    assert (first, second) == (f"  0: {said[0]}", f"  1: {said[1]}")
    assert said[0]


# Scored captions

SCORED = ("run.valid_splits=[val]", "run.max_epoch=1", "run.iters_per_epoch=2", "run.valid_captions=5")


def _scores(folder: Path) -> dict[str, float]:
    """Caption metrics of the only epoch, from `log.txt`."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    (line,) = [line for line in lines if "val_loss" in line]
    return {name: line[f"val_{name}"] for name in METRICS}


def _scores_by_hand(runner) -> dict[str, float]:
    """Greedy captions of all validation images, one at a time, scored together."""
    said, wanted = {}, {}
    model = runner.model.eval()
    for samples in _on_the_cpu(runner.valid_loaders[0]):
        for image, image_id, answer in zip(samples["image"], samples["image_id"], samples["answer"], strict=True):
            (said[image_id],) = model.generate(
                image[None], [model.prompt_list[0]], max_new_tokens=CAPTION_TOKENS, stop=[model.end_sym]
            )
            wanted.setdefault(image_id, []).append(answer)
    return score_captions(said, wanted)


def test_captions_are_scored_as_by_hand_and_noted_in_the_card(building, validated, tmp_path):
    """Several captions of an image are its references."""
    records = [{"image_id": str(n // 2), "caption": f"A dog sleeps on floor {n}."} for n in range(4)]
    (tmp_path / "val.json").write_text(json.dumps(records))
    place = f"datasets.cc_sbu_align.build_info.val_ann_path={tmp_path}/val.json"
    runner = building.build(validated.recipe, *SCORED, place)
    runner.train()
    scores = _scores(runner.folder)
    assert scores == pytest.approx(_scores_by_hand(runner), rel=1e-9)
    card = json.loads((runner.folder / "checkpoint_0.json").read_text())
    assert {name: card[name] for name in METRICS} == scores
    assert card["valid_loss"] == _losses(runner.folder)[0]
