"""The seven training runs of the reference: every loss, rate and weight norm, and the weights at the end.

The loop of the runner, without its files and its loader: the batches here are the reference's.
"""

import json
from pathlib import Path

import pytest
import torch

from minigpt4.common.distributed import Processes
from minigpt4.common.schedules import LinearWarmupCosineLRScheduler
from minigpt4.common.schemas.binding import bind
from minigpt4.common.schemas.run import RunConfig
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.runners.finite import FiniteWatch
from minigpt4.runners.state import resume
from minigpt4.runners.updates import Updater
from minigpt4.tasks import ImageTextPretrainTask

PARITY = Path(__file__).parent / "data" / "parity"
RUNS = {run["name"]: run for run in json.loads((PARITY / "golden.json").read_text())["train"]["runs"]}
PROJECTION = ("llama_proj.weight", "llama_proj.bias")
ATOL = 2e-5  # the parity README's, for losses and weights alike


def build(run) -> MiniGPT4:
    qformer = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    section = {
        "image_size": 56,
        "vit_weights": str(PARITY / "eva_vit_tiny.pth"),
        "vit_config": {"embed_dim": 64, "depth": 3, "num_heads": 4},
        "vit_precision": "fp32",
        "q_former_model": str(PARITY / "blip2_tiny.pth"),
        "qformer_config": qformer,
        "num_query_token": 8,
        "has_qformer": run["has_qformer"],
        "llama_model": str(PARITY / "vicuna_tiny"),
        "llm_precision": "fp32",
        "ckpt": str(PARITY / run["init_ckpt"]),
        "max_txt_len": 160,
        "end_sym": "###",
        "truncate_end_sym": True,
    }
    return MiniGPT4.from_config(section)


@pytest.fixture
def batches(golden, golden_tensors):
    """The reference's batches with the prompts that it drew."""
    train = golden["train"]

    def batch(entry) -> dict:
        prompt = train["prompt_template_arg"].format(train["prompts_filtered"][entry["prompt_choice"]])
        images = [golden_tensors[f"images/img{index}/train"] for index in entry["image_pool_index"]]
        return {
            "image": torch.stack(images),
            "answer": entry["answers"],
            "instruction_input": [prompt] * len(images),
        }

    return [batch(entry) for entry in train["batches"]]


def replay(run, batches, folder):
    """Losses, rates, norms before each step, and the projection at the end."""
    cfg = bind(RunConfig, run["run"] | {"accum_loss": "sum", "resume_ckpt_path": None}, section="run", source="golden")
    processes = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    model = build(run).train()
    updater = Updater(model, cfg, processes, FiniteWatch(folder, 1, rank=0), ImageTextPretrainTask().train_step)
    first_epoch = 0
    if run["run"]["resume_ckpt_path"]:
        resumed = resume(PARITY / run["run"]["resume_ckpt_path"], model, rank=0, world_size=1)
        updater.load_state(resumed.optimizer, resumed.scaler)
        first_epoch = resumed.position.epoch
    schedule = LinearWarmupCosineLRScheduler(
        updater.optimizer,
        cfg.max_epoch,
        cfg.iters_per_epoch,
        cfg.min_lr,
        cfg.init_lr,
        cfg.warmup_steps,
        cfg.warmup_lr,
    )
    losses, rates, norms = [], [], []
    given = iter(batches[run["first_batch"] :])
    trained = model.trainable_parameters()
    for epoch in range(first_epoch, cfg.max_epoch):
        for iteration in range(cfg.iters_per_epoch):
            schedule.step(epoch, iteration)
            closes = (iteration + 1) % cfg.accum_grad_iters == 0
            norms.append([trained[name].detach().double().norm() for name in PROJECTION])
            losses.append(updater.backward(next(given), closes_update=closes))
            rates.append(updater.optimizer.param_groups[0]["lr"])
            if closes:
                updater.update()
    return torch.stack(losses), torch.tensor(rates, dtype=torch.double), torch.tensor(norms), trained


@pytest.mark.parametrize("name", RUNS)
def test_training_run_meets_the_reference(name, batches, golden_tensors, tmp_path):
    losses, rates, norms, trained = replay(RUNS[name], batches, tmp_path)

    def assert_near(actual, key, atol=ATOL, rtol=0):
        expected = golden_tensors[f"train/{name}/{key}"]
        torch.testing.assert_close(actual.detach().to(expected.dtype), expected, atol=atol, rtol=rtol)

    assert_near(losses, "loss")
    assert_near(rates, "lr", atol=0, rtol=1e-12)
    assert_near(norms, "weight_norm_before_step")
    assert_near(trained["llama_proj.weight"], "final_llama_proj_weight")
    assert_near(trained["llama_proj.bias"], "final_llama_proj_bias")
