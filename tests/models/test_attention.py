"""The LLM's own attention functions give what transformers' give, in rows, with caches, and behind each other."""

import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from minigpt4.common.errors import ConfigError
from minigpt4.models.attention import FUSED, MATMUL, attention_for, compile_parts, require_compiler

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "one key a head": LlamaConfig(**SIZES),
    "two heads a key": LlamaConfig(**SIZES, num_key_value_heads=2),
    "biases": Qwen2Config(**SIZES, num_key_value_heads=4),
}


@pytest.fixture(params=CONFIGS)
def llm(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).requires_grad_(False).eval()


@pytest.fixture(params=[MATMUL, FUSED])
def attention(request):
    return request.param


def test_a_cpu_gets_products_and_other_devices_the_fused_kernel():
    assert attention_for(torch.device("cpu")) == MATMUL
    assert attention_for(torch.device("cuda", 1)) == FUSED


@pytest.mark.parametrize("mask", [[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]])
def test_logits_and_gradients_of_padded_rows_are_those_of_transformers(llm, attention, mask):
    mask = torch.tensor(mask)
    embeds = torch.randn(2, 5, 16)

    def results(name):
        llm.set_attn_implementation(name)
        own = embeds.clone().requires_grad_()
        logits = llm(inputs_embeds=own, attention_mask=mask).logits[mask.bool()]
        logits.square().sum().backward()
        return logits.detach(), own.grad

    for actual, expected in zip(results(attention), results("eager"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_generation_is_that_of_transformers(llm, attention):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.randint(1, 50, (2, 5))
    answers = []
    for name in (attention, "eager"):
        llm.set_attn_implementation(name)
        answers.append(
            llm.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=2, pad_token_id=0)
        )
    assert torch.equal(*answers)


def test_products_in_16_bits_are_near_those_in_32(llm):
    embeds = torch.randn(2, 5, 16)
    llm.set_attn_implementation(MATMUL)
    expected = llm(inputs_embeds=embeds).logits
    actual = llm.bfloat16()(inputs_embeds=embeds.bfloat16()).logits
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


# `run.compile`


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


def test_a_machine_without_compiler_is_told_so():
    from torch._inductor import config

    nothing = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with nothing, pytest.raises(ConfigError, match=r"run\.compile: needs a C\+\+ compiler"):
        require_compiler(torch.device("cpu"))
