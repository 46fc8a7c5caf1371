"""Runs that train the LLM: strict checkpoints, what cannot be trained. That they resume: lifetime, test_sharded.py."""

import pytest
import torch

from minigpt4.common.errors import ConfigError, RunError, WeightsError
from minigpt4.inference.pipeline import pipeline
from minigpt4.models import llm

ITERATIONS = 5
FP16_RTOL = 5e-3
FROM_FILES = "model.ckpt_allow_keys=[llama_model.*]"
RULES = {
    "full": ("model.train.llm=full", "model.train.projection.lr=1e-3"),
    "lora": ("model.train.llm.rule=lora", "model.train.llm.r=4"),
}


@pytest.fixture(scope="module")
def run(building, validated):
    """`run(*options)`: a runner of `ITERATIONS` updates; `.train()` is left to the test."""

    def build(*options):
        batches = [building.batch(2 * number, 2) for number in range(ITERATIONS)]
        lengths = ("run.max_epoch=1", f"run.iters_per_epoch={ITERATIONS}", "run.save_every_iters=1")
        options = (*building.CONSTANT_RATE, *lengths, building.WITHOUT_PROMPTS, FROM_FILES, *options)
        return building.build(validated.recipe, *options, runner=building.fed(batches))

    return build


@pytest.fixture(scope="module")
def whole(run):
    """By rule, a runner that has trained and has saved after each update."""
    runners = {rule: run(*options) for rule, options in RULES.items()}
    for runner in runners.values():
        runner.train()
    return runners


@pytest.mark.parametrize(
    ("change", "text"), [("missing", "missing: llama_model"), ("surplus", "not expected: llama_mo")]
)
def test_checkpoint_of_a_run_is_read_strictly_whatever_a_start_may_lack(change, text, whole, run, tmp_path):
    content = torch.load(whole["lora"].folder / "checkpoint_iter_2.pth", weights_only=True)
    name = min(content["model"])
    if change == "missing":
        del content["model"][name]
    else:
        content["model"][f"{name}.more"] = torch.ones(1)
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=text):
        run(*RULES["lora"], f"run.resume_ckpt_path={tmp_path}/checkpoint.pth").train()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((*RULES["lora"], "model.train.llm.alpha=32"), r"model\.train\.llm\.alpha is 32\.0"),
        ((*RULES["lora"], "model.train.llm.r=8"), "wrong shape: llama_model"),
        ((), "trained weights of its LLM.*model.train.llm says what this model has"),
    ],
)
def test_other_rule_than_that_of_the_checkpoint_is_refused(options, text, whole, run):
    path = f"run.resume_ckpt_path={whole['lora'].folder}/checkpoint_iter_2.pth"
    with pytest.raises(WeightsError, match=text):
        run(path, *options).train()


@pytest.fixture
def four_bits_on_cpus(monkeypatch):
    """They are refused there, where bitsandbytes is slow."""
    storage, cuda = llm._storage, torch.device("cuda")
    monkeypatch.setattr(llm, "_storage", lambda precision, device, dtype: storage(precision, cuda, dtype))
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # packs rows of whole blocks alone


def test_qlora_beside_a_vision_side_in_bf16_computes_in_bf16(run, four_bits_on_cpus, caplog):
    runner = run(*RULES["lora"], "model.train.llm.rule=qlora", "model.vit_precision=bf16")
    types = {p.dtype for p in runner.model.llama_model.parameters() if p.is_floating_point()}
    assert types == {torch.bfloat16, torch.float32}  # whole and trained ones
    runner.train()
    assert "small gradients are lost" not in caplog.text


def test_qlora_trains_as_lora_beside_the_weights_that_4_bits_leave(run, building, tools, four_bits_on_cpus):
    from bitsandbytes import functional

    rule = (*RULES["lora"], "model.train.llm.dropout=0", "run.init_lr=1e-2")
    quantised, plain = run(*rule, "model.train.llm.rule=qlora"), run(*rule)
    start = building.trained(quantised)
    for name, tensor in plain.model.trainable_parameters().items():
        tensor.data.copy_(start[name])
    others, frozen = dict(plain.model.llama_model.named_parameters()), {}
    for name, weight in quantised.model.llama_model.named_parameters():
        if hasattr(weight, "quant_state"):
            frozen[name] = weight.clone()
            others[name].data.copy_(functional.dequantize_4bit(weight.data, weight.quant_state))
    assert len(frozen) == 3 * 7
    for runner in (quantised, plain):
        runner.train()
    expected, found = tools["losses"](plain.folder), tools["losses"](quantised.folder)
    assert found == pytest.approx(expected, rel=FP16_RTOL)
    after = building.trained(quantised)
    assert not any(torch.equal(after[name], tensor) for name, tensor in start.items())
    weights = dict(quantised.model.llama_model.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in frozen.items())
    resumed = run(*rule, "model.train.llm.rule=qlora", f"run.resume_ckpt_path={quantised.folder}/checkpoint_iter_2.pth")
    resumed.train()
    assert tools["same"](building.trained(resumed), after)


@pytest.mark.parametrize("rule", RULES)
def test_pipeline_opens_a_run_that_trained_its_llm(rule, whole, building, tools):
    opened = pipeline(whole[rule].folder, device="cpu")
    assert tools["same"](opened.model.trainable_parameters(), building.trained(whole[rule]))
    assert opened.checkpoint is not None
    with pytest.raises(ConfigError, match="serve it alone"):
        opened.use_checkpoint(opened.checkpoint)


def test_nothing_to_train_and_adapters_that_are_passed_by_are_errors(run):
    with pytest.raises(ConfigError, match="model.train: everything is frozen"):
        run("model.train.projection=frozen")
    with pytest.raises(RunError, match=r"qkv\.lora_A.*no gradient reaches this adapter"):
        run("model.train.vision=lora", "model.ckpt=null").train()


def test_training_in_bf16_says_what_is_lost(run, caplog):
    run(*RULES["full"], "model.llm_precision=bf16").train()
    assert "an update below 1/512 of its weight is lost. model.llm_precision: fp32 with run.amp" in caplog.text


def test_file_of_an_earlier_stage_is_named_where_it_may_lack_the_llm(run, caplog):
    run(*RULES["full"]).train()
    assert "minigpt4_tiny.pth: lacks trained weights of llama_model, which stay as" in caplog.text
    assert "1/512" not in caplog.text
