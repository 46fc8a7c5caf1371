"""LLaVA's stages through the runner: rates, losses, gradient norms and weights are the reference's, step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minigpt4.datasets.datasets.dataloader_utils import to_device
from minigpt4.models.train_rules import OF_PEFT_MODEL
from minigpt4.runners import RunnerBase

LLAVA = Path(__file__).parents[1] / "data" / "parity_llava"
GOLDEN = json.loads((LLAVA / "train.json").read_text())
RATE_RTOL = 1e-12
LOSS_ATOL, NORM_ATOL, PROJECTOR_ATOL, LLM_ATOL, LORA_ATOL = 2e-5, 1e-4, 2e-5, 1e-4, 2e-5
LLM = {"llm": "full"}
LORA = {"llm": {"rule": "lora", "r": 4, "alpha": 8, "dropout": 0.0}}
RUNS: dict[str, dict[str, Any]] = {
    "stage1_linear": {},
    "stage1_mlp": {},
    "stage2_linear": LLM,
    "stage2_mlp_mm_lr": LLM,
    "stage2_accumulate": LLM,
    "stage2_frozen_projector": LLM | {"projection": "frozen"},
    "stage2_freeze_backbone": {"llm": "head"},
    "lora": LORA,
}
"""`model.train` of the reference's runs."""


class Replay(RunnerBase):
    """The reference's micro-batches in place of a loader's; keeps what the steps did."""

    def __init__(self, batches: list[list[int]], *arguments: Any) -> None:
        self.indices = batches
        super().__init__(*arguments)
        self.rates, self.norms = [], []
        norm = self.rows.total_norm
        self.rows.total_norm = lambda: (self.norms.append(norm()), self.norms[-1])[1]
        self.optimizer.register_step_pre_hook(
            lambda optimizer, *_: self.rates.append([group["lr"] for group in optimizer.param_groups])
        )

    def build_train_loader(self, datasets):
        self.data = datasets["llava_conversations"]["train"]

    def batch(self, indices: list[int]) -> dict[str, Any]:
        samples = [next(self.data.open(index, 1, None)).load() for index in indices]
        return to_device(self.data.collater(samples), self.device)


def section(llava_section, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    kind = arguments.get("mm_projector_type", "linear")
    start = LLAVA / arguments["pretrain_mm_mlp_adapter"].removeprefix("runs/")
    start = start if start.is_file() else LLAVA / Path(arguments["pretrain_mm_mlp_adapter"]).name
    train = json.loads(json.dumps(RUNS[name]))
    if rate := arguments.get("mm_projector_lr"):
        train["projection"] = {"lr": rate}
    return llava_section(
        model_type="v1",
        image_size=56,
        projection=kind,
        ckpt=str(start),
        ckpt_allow_keys=["llama_model.*"] if "llm" in train else [],
        conv_template=arguments["version"],
        image_aspect_ratio=arguments.get("image_aspect_ratio", "square"),
        train=train,
    )


@pytest.fixture(scope="module", params=RUNS)
def replay(request, building, llava_section, parity_dir, tmp_path_factory) -> tuple[str, RunnerBase, list[float]]:
    """A run of the reference, replayed: its name, the runner after it, the loss of each micro-batch."""
    golden, folder = GOLDEN[request.param], tmp_path_factory.mktemp(request.param)
    arguments, batches = golden["arguments"], [batch["indices"] for batch in golden["micro_batches"]]
    info = {"ann_path": str(LLAVA / arguments["data_path"]), "image_path": str(parity_dir / "images"), "id_field": "id"}
    processor = {"train": {"name": "clip_image_train"}, "eval": {"name": "clip_image_eval"}}
    accumulation = arguments["gradient_accumulation_steps"]
    config = {
        "model": section(llava_section, request.param, arguments),
        "datasets": {
            "llava_conversations": {
                "type": "llava_instruct_80k",
                "build_info": info,
                "vis_processor": processor,
                "batch_size": 4,
            }
        },
        "run": {
            "task": "image_text_pretrain",
            "lr_sched": "cosine_lr",
            "warmup_ratio": arguments["warmup_ratio"],
            "init_lr": arguments["learning_rate"],
            "weight_decay": arguments["weight_decay"],
            "max_grad_norm": 1.0,
            "accum_grad_iters": accumulation,
            "accum_loss": "mean_of_means",
            "max_epoch": 1,
            "iters_per_epoch": len(batches),
            "num_workers": 0,
            "device": "cpu",
            "output_dir": str(folder),
        },
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    runner = building.build(recipe, runner=lambda *a: Replay(batches, *a))
    if "lora" in request.param:
        start = load_file(LLAVA / "lora_init.safetensors")
        trained = runner.model.trainable_parameters()
        for name, tensor in start.items():
            trained[f"llama_model.{name}"].data.copy_(tensor)
    losses = [
        runner.train_step(0, number, runner.batch(indices)).item() / accumulation
        for number, indices in enumerate(batches)
    ]
    return request.param, runner, losses


@pytest.fixture(scope="module")
def expected(replay):
    prefix = f"train/{replay[0]}/"
    tensors = load_file(LLAVA / "golden_train.safetensors")
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def near(found: Any, wanted: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(torch.as_tensor(found, dtype=wanted.dtype), wanted, **{"rtol": 0, "atol": 0} | tolerance)


def test_losses_and_gradient_norms(replay, expected):
    _, runner, losses = replay
    near(losses, expected["loss"], atol=LOSS_ATOL)
    near(torch.stack(runner.norms), expected["grad_norm"], atol=NORM_ATOL)


def test_groups_and_their_rates(replay, expected):
    name, runner, _ = replay
    groups = [(g["weight_decay"], len(g["params"])) for g in runner.optimizer.param_groups]
    wanted = [(g["weight_decay"], len(g["names"])) for g in GOLDEN[name]["param_groups"]]
    assert groups == wanted
    near(runner.rates, expected["lr"], rtol=RATE_RTOL)
    assert sum(p.numel() for p in runner.parameters.values()) == GOLDEN[name]["trainable_parameters"]


def test_weights_at_the_end(replay, expected):
    name, runner, _ = replay
    model = runner.model
    final = {key.removeprefix("final/"): t for key, t in expected.items() if key.startswith("final/")}
    ours = dict(model.llama_model.named_parameters())
    for key, wanted in final.items():
        if "vision_tower" in key:
            continue
        key = key.removeprefix(OF_PEFT_MODEL)
        is_projector = "mm_projector." in key
        found = model.llama_proj.state_dict()[key.partition("mm_projector.")[2]] if is_projector else ours[key]
        near(found.detach(), wanted, atol=PROJECTOR_ATOL if is_projector else LLM_ATOL)
    if name == "lora":
        for key, wanted in load_file(LLAVA / "lora" / "adapter_model.safetensors").items():
            key = key.removeprefix(OF_PEFT_MODEL).replace(".weight", ".default.weight")
            near(ours[key].detach(), wanted, atol=LORA_ATOL)


def test_loss_after_training(replay):
    name, runner, _ = replay
    after = GOLDEN[name]["loss_after_training"]
    with torch.no_grad():
        loss = runner.model.eval()(runner.batch(after["indices"]))["loss"]
    assert loss.item() == pytest.approx(after["loss"], abs=LOSS_ATOL)
