"""`run.parallel: fsdp` on two processes: what each holds, and that everything is as with the whole LLM in each."""

import json
from pathlib import Path

import pytest
import torch

from minigpt4.common.errors import ConfigError
from minigpt4.models.fsdp import is_sharded


@pytest.fixture(scope="module")
def ranks(validated, run_ranks) -> list[dict]:
    """What the scenarios of `sharded_ranks.py` returned, for rank 0 and rank 1."""
    return run_ranks(validated, "sharded_ranks.py", "sharded")


@pytest.fixture(scope="module")
def sharded_module(building, tools):
    """`sharded_ranks.py` in this process, for what it feeds its runs."""
    return tools["load"]("sharded_ranks")


@pytest.mark.parametrize(("whole", "sharded", "error"), [("ddp", "fsdp", 0), ("mixed", "mixed_fsdp", 1e-6)])
def test_losses_and_weights_are_those_of_ddp(ranks, whole, sharded, error):
    for rank in ranks:
        expected, found = rank["training"][whole], rank["training"][sharded]
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=error, atol=0)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=error, atol=error)


def test_each_process_holds_half_of_the_layers_and_all_that_is_outside(ranks):
    for rank in ranks:
        held = rank["training"]["held"]
        (all_layers, own_layers), (all_others, own_others) = held["layers"], held["others"]
        assert held["is_sharded"]
        assert own_layers == all_layers / 2
        assert own_others == all_others


def test_checkpoint_and_card_are_those_of_ddp(ranks, tools):
    ddp, fsdp = (Path(ranks[0]["training"][way]["folder"]) for way in ("ddp", "fsdp"))
    ours, theirs = (torch.load(folder / "checkpoint_0.pth", weights_only=True) for folder in (fsdp, ddp))
    assert tools["same"](ours["model"], theirs["model"])
    assert torch.equal(ours["optimizer"]["state"][0]["exp_avg"], theirs["optimizer"]["state"][0]["exp_avg"]), (
        "the optimizer's state"
    )
    cards = [json.loads((folder / "checkpoint_0.json").read_text()) for folder in (fsdp, ddp)]
    assert cards[0]["llm_fingerprint"] == cards[1]["llm_fingerprint"]
    assert cards[0]["trained"] == cards[1]["trained"]


@pytest.mark.parametrize("direction", ["to_fsdp", "to_ddp"])
def test_a_run_goes_on_in_the_other_way(ranks, direction):
    for rank in ranks:
        expected, found = rank["training"]["ddp"], rank["training"][direction]
        assert torch.equal(found["losses"], expected["losses"][2:])
        assert all(torch.equal(found["weights"][name], weight) for name, weight in expected["weights"].items())


# A trained LLM


@pytest.fixture(scope="module")
def alone(building, validated, sharded_module) -> dict[str, torch.Tensor]:
    """Weights of the run of `scenario_trained_llm` in one process: each rank's batch a micro-batch of an update."""
    pairs = zip(sharded_module._batches(0), sharded_module._batches(1), strict=True)
    batches = [batch for pair in pairs for batch in pair]
    lengths = ("run.max_epoch=1", f"run.iters_per_epoch={len(batches)}", "run.accum_grad_iters=2")
    options = (*building.CONSTANT_RATE, *lengths, building.WITHOUT_PROMPTS, *sharded_module.TRAINED_LLM)
    runner = building.build(validated.recipe, *options, runner=building.fed(batches))
    runner.train()
    return building.trained(runner)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "to_ddp", "to_fsdp", "to_itself"])
def test_llm_trained_in_full_by_two_processes_is_that_of_one(ranks, alone, way):
    for rank in ranks:
        weights = rank["trained_llm"][way]["weights"]
        assert weights.keys() == alone.keys()
        for name, weight in alone.items():
            assert (weights[name] - weight).norm() <= 1e-6 * weight.norm(), name


def test_resume_of_a_sharded_trained_llm_is_exact(ranks):
    for rank in ranks:
        trained = rank["trained_llm"]
        assert trained["fsdp"]["held"]["layers"][1] == trained["fsdp"]["held"]["layers"][0] / 2
        for way, begun, since in (("to_itself", "fsdp", 2), ("lora_on", "lora", 3)):
            assert torch.equal(trained[way]["losses"], trained[begun]["losses"][since:])
            weights = trained[begun]["weights"].items()
            assert all(torch.equal(trained[way]["weights"][name], weight) for name, weight in weights)


def test_validation_with_uneven_shares_is_that_of_ddp(ranks):
    for rank in ranks:
        assert rank["validation"]["fsdp"] == rank["validation"]["ddp"]
    assert len(ranks[0]["validation"]["fsdp"]["shown"]) == 2
    assert not ranks[1]["validation"]["fsdp"]["shown"]


def test_answers_of_uneven_shares_are_those_of_whole_llms(ranks):
    for rank in ranks:
        assert rank["answers"]["fsdp"] == rank["answers"]["ddp"]
    (greedy, beams), counts, captions = ranks[0]["answers"]["fsdp"]
    assert len(greedy) == len(beams) == len(captions) == counts[0] == 3


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_rows_that_do_not_divide_evenly_are_all_there(ranks, format):
    for rank in ranks:
        odd = rank["odd_rows"][format]
        assert odd["whole"].keys() == odd["sharded"].keys()
        assert all(torch.equal(odd["sharded"][name], tensor) for name, tensor in odd["whole"].items())
        assert odd["fingerprints"][0] == odd["fingerprints"][1]
    assert [rank["odd_rows"][format]["rows"] for rank in ranks] == [17, 16]


def test_a_process_whose_partner_dies_says_so(ranks, validated):
    text = (validated.folder / "left_alone.txt").read_text()
    assert text.startswith("run.parallel: fsdp: the other processes did not come to the LLM's next pass")


@pytest.mark.parametrize("option", ["model.llm_precision=nf4", "model.llm_precision=int8", "model.low_resource=True"])
def test_quantised_llm_is_refused_by_name(building, validated, option):
    with pytest.raises(ConfigError, match=r"run.parallel: fsdp does not go with an LLM in (nf4|int8).*llm_precision"):
        building.read(validated.recipe, option, "run.parallel=fsdp")


def test_one_process_holds_the_whole_llm_and_says_so(building, validated, caplog):
    runner = building.build(validated.recipe, "run.parallel=fsdp")
    runner.loader.close()
    assert not is_sharded(runner.model.llama_model)
    assert "run.parallel: fsdp has one process only, which holds the whole LLM" in caplog.text
