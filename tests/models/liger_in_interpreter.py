"""Run by test_liger.py with TRITON_INTERPRET=1: steps of the reference, computed by Liger's kernels on the CPU."""

import importlib.util
from pathlib import Path

import pytest
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime.interpreter import GridExecutor

from minigpt4.models.attention import use_liger

SPEC = importlib.util.spec_from_file_location("forward_cases", Path(__file__).with_name("test_minigpt4_forward.py"))
FORWARD = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FORWARD)


class Number(float):
    """A kernel's argument; compiled kernels get tensors, the interpreter hands over Python's floats, which know no
    `to`."""

    def to(self, dtype: object) -> "Number":
        return self


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Gives the interpreter what it lacks; the kernels that it has run."""
    call, names = GridExecutor.__call__, []

    def with_numbers(self, *args, **kwargs):
        names.append(self.fn.__name__)
        given = [Number(a) if type(a) is float else a for a in args]
        return call(self, *given, **{k: Number(v) if type(v) is float else v for k, v in kwargs.items()})

    monkeypatch.setattr(GridExecutor, "__call__", with_numbers)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # in place of CUDA's library of functions
    return names


@pytest.mark.parametrize("name", ["stage2", "conversation"])
def test_a_step_meets_the_reference(build_model, parity_dir, pool, golden_tensors, assert_near, launches, name):
    case = next(case for case in FORWARD.GOLDEN["cases"] if case["name"] == name)
    model = build_model(**FORWARD.section_of(case, parity_dir)).train()
    layers = model.llama_model.config.num_hidden_layers
    assert use_liger(model.llama_model) == 3 * layers + 1  # two norms and an MLP each, and the last norm
    result = FORWARD.run_case(model, case, pool)
    for kind, number in (("rms_norm", 2 * layers + 1), ("swiglu", layers)):
        for way in ("forward", "backward"):
            assert sum(kind in kernel and way in kernel for kernel in launches) >= number, (kind, way, launches)
    assert_near(result.loss, torch.tensor(case["loss"]), FORWARD.LOSS_ATOL)
    for part in ("weight", "bias"):
        expected = golden_tensors[f"forward/{name}/grad_llama_proj_{part}"]
        assert_near(getattr(model.llama_proj, part).grad, expected, FORWARD.GRAD_ATOL)
