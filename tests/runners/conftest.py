"""Whole runs of `train.py` on tiny weights: as processes of their own, alone or under torchrun."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
CAPTIONS = (
    "A brown dog sleeps on a red blanket.",
    "Two people walk along the river.",
    "The table is set for dinner.",
    "A yellow bus waits at the station.",
    "There are many boats in the harbour.",
)

RECIPE = """
model:
  arch: minigpt4
  model_type: pretrain_vicuna0
  image_size: 56
  vit_weights: {parity}/eva_vit_tiny.pth
  vit_config: {{embed_dim: 64, depth: 3, num_heads: 4}}
  q_former_model: {parity}/blip2_tiny.pth
  num_query_token: 8
  qformer_config: {{hidden_size: 48, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 96}}
  llama_model: {parity}/vicuna_tiny
  vit_precision: fp32
  llm_precision: fp32
  ckpt: {parity}/minigpt4_tiny.pth
  prompt_path: {parity}/prompts_tiny.txt
  prompt_template: '###Human: {{}} ###Assistant: '
  max_txt_len: 60
  end_sym: '###'
datasets:
  cc_sbu_align:
    batch_size: 2
    build_info: {{storage: {folder}/cc_sbu_align}}
    vis_processor:
      train: {{name: blip2_image_train, image_size: 56}}
      eval: {{name: blip2_image_eval, image_size: 56}}
run:
  task: image_text_pretrain
  init_lr: 2e-3
  min_lr: 2e-4
  warmup_lr: 1e-5
  warmup_steps: 5
  max_epoch: 2
  iters_per_epoch: 10
  num_workers: 0
  log_freq: 1
  output_dir: {folder}/output
  device: cpu
  amp: False
"""


@dataclass(frozen=True)
class Tiny:
    """A folder with data and a recipe, and how to run it."""

    folder: Path
    recipe: Path

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def runs(self) -> list[Path]:
        """Run folders, oldest first."""
        return sorted(path for path in self.output.iterdir() if path.is_dir())


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This environment with one thread a process, and the package on the path."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(more or {})}


def load(name: str, folder: Path = Path(__file__).parent) -> ModuleType:
    """A module beside this file, which tests cannot import by its name."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


supervised = load("supervised", Path(__file__).parents[1])
warm_runs = load("warm", Path(__file__).parents[1])


def losses(run: Path) -> dict[int, float]:
    """Loss of rank 0 by global step, from `metrics.jsonl` (log_freq 1)."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Trained weights of a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["model"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="session")
def building() -> ModuleType:
    """The module `building.py`, which builds runners inside this process."""
    return load("building")


@pytest.fixture(scope="session")
def validated(tmp_path_factory: pytest.TempPathFactory, parity_dir: Path) -> Tiny:
    """A tiny recipe whose dataset also has 5 validation samples, of very different lengths; others only read it."""
    tiny = make_tiny(tmp_path_factory.mktemp("validated"), parity_dir)
    records = [{"image_id": str(n), "caption": " ".join(CAPTIONS[: n + 1])} for n in range(5)]
    (tiny.folder / "val.json").write_text(json.dumps(records))
    storage = f"storage: {tiny.folder}/cc_sbu_align"
    recipe = tiny.recipe.read_text().replace(storage, f"{storage}, val_ann_path: {tiny.folder}/val.json")
    tiny.recipe.write_text(recipe)
    return tiny


@pytest.fixture(scope="session")
def run_ranks(warm) -> Callable[[Tiny, str, str], list[dict]]:
    """Runs a script beside this file as two processes; what each saved, in `{saved}{rank}.pt`."""

    def run(tiny: Tiny, script: str, saved: str) -> list[dict]:
        path = Path(__file__).with_name(script)
        started = warm.script(path, tiny.recipe, tiny.folder, cwd=tiny.folder, processes=2)
        assert started.wait() == [0, 0], started.text()[-6000:]
        return [torch.load(tiny.folder / f"{saved}{rank}.pt", weights_only=True) for rank in range(2)]

    return run


@pytest.fixture(scope="session")
def two_ranks(validated: Tiny, run_ranks) -> list[dict]:
    """What the scenarios of `two_ranks.py` returned, for rank 0 and rank 1."""
    return run_ranks(validated, "two_ranks.py", "rank")


@pytest.fixture
def tiny(tmp_path: Path, parity_dir: Path) -> Tiny:
    """24 images with captions and a stage-2 recipe of 2 x 10 iterations."""
    return make_tiny(tmp_path, parity_dir)


@pytest.fixture(scope="session")
def tools() -> dict[str, Any]:
    """Helpers that tests cannot import from here."""
    functions = (load, losses, weights, same, environment, make_tiny, warm_runs.free_port, warm_runs.until)
    return {
        "supervised": supervised,
        "WarmServer": warm_runs.WarmServer,
        **{function.__name__: function for function in functions},
    }


def make_tiny(folder: Path, parity: Path, count: int = 24) -> Tiny:
    """Write data and recipe into `folder`."""
    random = np.random.default_rng(0)
    images = folder / "cc_sbu_align" / "image"
    images.mkdir(parents=True)
    annotations = []
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(images / f"{number}.jpg")
        caption = f"{CAPTIONS[number % len(CAPTIONS)]} It is number {number}."
        annotations.append({"image_id": str(number), "caption": caption})
    (images.parent / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(parity=parity, folder=folder))
    return Tiny(folder, recipe)
