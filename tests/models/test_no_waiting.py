"""The host asks a training step's device for nothing: on the meta device, which has no values, the step still runs.

Reading a number, finding the places of a mask, copying to the host: what would wait for a GPU is an error there.
"""

import pytest
import torch

PROMPT = "###Human: <Img><ImageHere></Img> Describe this image. ###Assistant: "
TEXTS = {
    "answers": {"answer": ["A brown dog sleeps.", "Two people walk along the river."]},
    "prompts": {"answer": ["A dog.", "Two people walk."], "instruction_input": [PROMPT] * 2},
    "conversations": {
        "conv_q": [f"{PROMPT}!@#And?", f"{PROMPT}!@#Why?"],
        "conv_a": ["A dog.!@#No.", "A cat.!@#Yes."],
        "connect_sym": ["!@#"] * 2,
    },
}


@pytest.fixture(scope="module")
def built(build_model):
    return build_model(end_sym="###").train().to("meta")


@pytest.fixture
def meta_model(built, monkeypatch):
    asked = torch.is_autocast_enabled
    # The meta device knows no autocast, not even that it is off.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and asked(kind))
    return built


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("logits", ["targets", "all"])
def test_loss_and_gradients_are_made_without_a_look_at_the_device(meta_model, texts, logits, monkeypatch):
    monkeypatch.setattr(meta_model.cfg, "llm_logits", logits)
    output = meta_model({"image": torch.empty(2, 3, 56, 56, device="meta"), **TEXTS[texts]})
    output["loss"].backward()
    assert output["loss"].device.type == "meta"
    assert output["num_tokens"] > 0
    assert meta_model.llama_proj.weight.grad.device.type == "meta"


def test_a_look_at_the_device_would_be_noticed(meta_model):
    loss = meta_model({"image": torch.empty(2, 3, 56, 56, device="meta"), **TEXTS["answers"]})["loss"]
    for wait in (loss.item, loss.cpu, loss[None].nonzero, lambda: bool(loss), lambda: loss[None].unique()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("texts", TEXTS)
def test_loss_and_gradients_on_a_gpu_do_not_synchronise(build_model, texts):
    model = build_model(end_sym="###").train().to("cuda")
    samples = {"image": torch.zeros(2, 3, 56, 56, device="cuda"), **TEXTS[texts]}
    model(samples)["loss"].backward()  # the first step keeps the prefix and makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(samples)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
