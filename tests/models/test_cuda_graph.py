"""`model.vit_cuda_graph` and `model.llm_cuda_graph`: refused where they cannot work, without effect on a CPU, and on a
GPU the numbers of the passes that they replay."""

import pytest
import torch

from minigpt4.conversation.decoding import Decoding
from minigpt4.models import batch_decoder
from minigpt4.models.cuda_graph import CudaGraphs
from minigpt4.models.generation import generate_ids
from minigpt4.models.mini_gpt4 import MiniGPT4

BOTH = {"vit_cuda_graph": True, "llm_cuda_graph": True}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TEXTS = ["###Human: Hi ###Assistant: ", "###Human: Describe the boats and all the people. ###Assistant: "]


def test_an_llm_whose_attention_is_of_transformers_goes_on_without(build_model, caplog):
    model = build_model(llm_cuda_graph=True, llm_attention="eager")
    assert model.token_graphs is None
    assert "model.llm_cuda_graph: only for LLaMA-like LLMs" in caplog.text


def test_on_a_cpu_the_switches_change_nothing(build_model, model, pool):
    graphed = build_model(**BOTH).eval()
    assert graphed.token_graphs is None
    for _ in range(4):
        assert torch.equal(graphed.image_features(pool[:2]), model.image_features(pool[:2]))
    said = [one.generate(None, TEXTS, max_new_tokens=12) for one in (graphed, model)]
    assert said[0] == said[1]


@needs_gpu
def test_a_replay_gives_the_features_that_its_kernels_give(tiny_section, pool):
    plain, graphed = (MiniGPT4.from_config(tiny_section(**changes), "cuda").eval() for changes in ({}, BOTH))
    for start in (0, 1, 2, 3, 0):  # other pixels in the same buffer
        pixels = pool[start : start + 2]
        assert torch.equal(graphed.image_features(pixels), plain.image_features(pixels))
    assert graphed._vision_graphs.works
    assert graphed._vision_graphs._graphs


@needs_gpu
def test_a_graph_gives_the_answers_that_its_kernels_give(tiny_section, monkeypatch):
    monkeypatch.setattr(batch_decoder, "STEADY", 2)
    model, graphs = MiniGPT4.from_config(tiny_section(), "cuda").eval(), CudaGraphs("test")
    inputs = (model.llama_model, model.llama_tokenizer, *model.prompt_embeds(TEXTS, [[], []]))
    for limit in (24, 160):
        decoding = Decoding(max_new_tokens=limit)
        assert torch.equal(generate_ids(*inputs, decoding, graphs=graphs), generate_ids(*inputs, decoding))
    assert graphs.works
