"""`model.llm_kernels: liger` computes the reference's steps, or says why it cannot.

The kernels are Triton's. Here they run in its interpreter, in a process of its own, because the interpreter must be
chosen before Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.models import attention

CASES = Path(__file__).with_name("liger_in_interpreter.py")


def test_steps_by_liger_meet_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "2 passed" in done.stdout


def test_liger_without_a_gpu_is_refused_by_name(build_model):
    with pytest.raises(ConfigError, match=r"model\.llm_kernels: liger: its kernels run on CUDA GPUs, .* goes to cpu"):
        build_model(llm_kernels="liger")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package liger-kernel: pip install -e '\.\[gpu\]'"):
        attention.require_liger(torch.device("cuda"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gemma2", "hidden_act": "silu"}, "gemma2 with silu"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "llama with gelu"),
        ({"model_type": "gpt2"}, "gpt2 with None"),
    ],
)
def test_an_llm_that_computes_otherwise_is_refused(config, said):
    llm = nn.Module()
    llm.config = SimpleNamespace(**config)
    with pytest.raises(ConfigError, match=f"the LLM is {said}"):
        attention.use_liger(llm)
