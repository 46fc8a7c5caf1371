"""Steps of the recipes at 7B and 13B on the mock: `train.py --check` estimates their memory, and none waits."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4.check import check
from minigpt4.common.config import Config

REPOSITORY = Path(__file__).parents[2]
ALLOWANCE = "CUDA and allocator"


BF16 = ("run.amp_dtype=bf16", "model.vit_precision=bf16")
TRAINED = {
    "fp32": (*BF16, "model.train.llm=full", "model.llm_precision=fp32"),
    "fp32, accumulated": (*BF16, "model.train.llm=full", "model.llm_precision=fp32", "run.accum_grad_iters=2"),
    "bf16": (*BF16, "model.train.llm=full", "model.llm_precision=bf16", "model.llm_grad_checkpoint=True"),
    "last": (*BF16, "model.train.llm.rule=last", "model.train.llm.blocks=4", "model.llm_precision=fp32"),
    "lora": (*BF16, "model.train.llm=lora", "model.llm_precision=bf16"),
}


def _step(mock_gpu, recipe, *more, gib, gpus=1, **variables):
    arguments = ("benchmarks/gpu_step.py", f"train_configs/{recipe}.yaml", *more)
    done = mock_gpu(*arguments, processes=gpus, MOCK_CUDA_GIB=str(gib), **variables)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def _check(recipe, *options, gpus=None):
    """What `train.py --check` says, and the GiB of its table by row."""
    text = check(Config(SimpleNamespace(cfg_path=f"train_configs/{recipe}.yaml", options=options)), gpus=gpus)
    table = re.findall(r"^  (\S.*?)  +([\d.]+) GiB$", text, re.MULTILINE)
    return text, {name: float(gib) for name, gib in table}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("recipe", "llm"),
    [("minigpt4_flickr_finetune", "7b"), ("minigpt4_stage1_pretrain", "7b"), ("minigpt4_13b_stage2_finetune", "13b")],
)
def test_memory_of_a_step_is_what_check_says(mock_gpu, recipe, llm):
    step = _step(mock_gpu, recipe, "--llm", llm, "--steps", "3", gib=79)
    _, table = _check(recipe)
    assert step["allocated_gib"] == pytest.approx(table["total"] - table[ALLOWANCE], rel=0.03)
    assert set(step["waits"][2:]) == {0}


@pytest.mark.parametrize("trained", [(), ("model.llm_grad_checkpoint=True", *TRAINED["fp32"])], ids=["frozen", "full"])
def test_memory_of_a_sharded_step_is_what_check_says(mock_gpu, trained):
    options = ("run.parallel=fsdp", *trained)
    step = _step(mock_gpu, "minigpt4_flickr_finetune", "--steps", "3", "--options", *options, gib=79, gpus=2)
    _, table = _check("minigpt4_flickr_finetune", *options, gpus=2)
    assert step["allocated_gib"] == pytest.approx(table["total"] - table[ALLOWANCE], rel=0.03)


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_memory_of_a_step_with_a_trained_llm_is_what_check_says(mock_gpu, options):
    if "model.train.llm=lora" in options:
        pytest.importorskip("peft")
    step = _step(mock_gpu, "minigpt4_flickr_finetune", "--steps", "4", "--options", *options, gib=141)
    _, table = _check("minigpt4_flickr_finetune", *options)
    assert step["allocated_gib"] == pytest.approx(table["total"] - table[ALLOWANCE], rel=0.03)
    assert set(step["waits"][2:]) == {0}


@pytest.mark.parametrize("recipe", ["minigpt4_stage1_pretrain", "minigpt4_stage2_finetune"])
def test_the_largest_batch_that_check_names_fits_a_card_and_the_next_does_not(mock_gpu, recipe):
    """By the allocator's segments of fixed size, whose gaps are in the allowance; expanding ones need less."""
    text, _ = _check(recipe)
    largest = int(re.search(r"largest batch that fits is (\d+)", text)[1])
    card = {"gib": 23.6, "PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    assert not _step(mock_gpu, recipe, "--batch", str(largest), "--steps", "2", **card)["out_of_memory"]
    assert _step(mock_gpu, recipe, "--batch", str(largest + 1), "--steps", "2", **card)["out_of_memory"]
