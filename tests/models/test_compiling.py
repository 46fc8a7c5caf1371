"""`run.compile` changes no number, or says what it lacks."""

import os
import shutil

import pytest
import torch

from minigpt4.common.errors import ConfigError
from minigpt4.models.attention import compile_parts, require_compiler


def step(model, samples):
    loss = model(samples)["loss"]
    loss.backward()
    return loss.detach(), model.llama_proj.weight.grad


def test_a_compiled_model_computes_the_same_step_or_names_the_missing_compiler(build_model, pool):
    samples = {"image": pool[:2], "answer": ["a brown dog sleeps", "boats"]}
    compiled = build_model()
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        with pytest.raises(ConfigError, match=r"run\.compile: needs a C\+\+ compiler"):
            compile_parts(compiled)
        return
    compile_parts(compiled)
    for actual, expected in zip(step(compiled, samples), step(build_model(), samples), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    layer = compiled.llama_model.base_model.layers[0]
    parts = (layer.mlp, layer.input_layernorm, compiled.visual_encoder.model.blocks[0])
    assert all(part._compiled_call_impl is not None for part in parts)


def test_a_machine_without_compiler_is_told_so(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"run\.compile: needs a C\+\+ compiler"):
        require_compiler(torch.device("cpu"))
