"""A configuration with tiny weights, and what is loaded from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.inference.pipeline import Pipeline, pipeline

TEMPLATE = "###Human: {} ###Assistant: "
PROMPT = "<Img><ImageHere></Img> What is this?"


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For all tests here."""


@pytest.fixture(scope="session")
def write_config(tiny_section, write_recipe) -> Callable[..., Path]:
    """`write_config(folder, ckpt=None)`: a YAML file whose `model:` has these changes."""

    def write(folder: Path, **changes: Any) -> Path:
        published = {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "prompt_template": TEMPLATE}
        generation = {"prompt": PROMPT, "max_new_tokens": 6}
        section = tiny_section(**published, end_sym="###") | changes
        return write_recipe(folder, section, num_workers=0, device="cpu", generation=generation)

    return write


@pytest.fixture(scope="session")
def config(write_config, tmp_path_factory) -> Path:
    """The file with the published tiny checkpoint."""
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def tiny(config) -> Pipeline:
    """A model that nobody changes for longer than a test."""
    return pipeline(config, device="cpu")


@pytest.fixture(scope="session")
def files(parity_dir) -> list[Path]:
    """Images of several kinds."""
    return sorted((parity_dir / "images").glob("img*.png"))


@pytest.fixture(scope="session")
def other_checkpoint(parity_dir, tmp_path_factory) -> Path:
    """The published tiny projection with noise."""
    published = torch.load(parity_dir / "minigpt4_tiny.pth", weights_only=True)["model"]
    noise = torch.Generator().manual_seed(1)
    start = {name: tensor for name, tensor in published.items() if name.startswith("llama_proj")}
    file = tmp_path_factory.mktemp("other") / "other.pth"
    torch.save({"model": {k: t + 0.5 * torch.randn(t.shape, generator=noise) for k, t in start.items()}}, file)
    return file
