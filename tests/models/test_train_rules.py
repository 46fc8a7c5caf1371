"""`model.train`: what each rule trains and leaves alone, and that LoRA and full tuning are those of peft and torch."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from minigpt4.common.errors import RunError
from minigpt4.models.base_model import is_trained
from minigpt4.models.prompting import read_samples
from minigpt4.runners.state import require_adapters_trained

STEPS = 20
FROM_FILES = {"ckpt_allow_keys": ["llama_model.*", "Qformer.*", "query_tokens", "visual_encoder.*", "ln_vision.*"]}
LORA = {"rule": "lora", "r": 4, "alpha": 8, "dropout": 0.0}


def samples(pool, *, image=True) -> dict:
    texts = {"answer": ["a small brown dog", "two people walk along the river"], "image_id": ["a", "b"]}
    return {"image": pool[:2], **texts} if image else texts


@pytest.fixture
def build(build_model):
    """`build(**train)`: the tiny model with these rules, in train mode."""

    def rules(section=None, **train):
        return build_model(train=train, **FROM_FILES, **(section or {})).train()

    return rules


# The rules


CASES = {
    "projection": ({}, {"llama_proj"}, 2),
    "llm full": ({"llm": "full"}, {"llama_proj", "llama_model"}, 2 + 30),
    "llm last": ({"llm": {"rule": "last", "blocks": 2}}, {"llama_proj", "llama_model"}, 2 + 18),
    "llm head": ({"llm": "head"}, {"llama_proj", "llama_model"}, 2 + 1),
    "llm lora": ({"llm": LORA}, {"llama_proj", "llama_model"}, 2 + 3 * 7 * 2),
    "llm lora, two layers": (
        {"llm": LORA | {"target_modules": ["q_proj", "v_proj"]}},
        {"llama_proj", "llama_model"},
        14,
    ),
    "llm alone": ({"llm": "full", "projection": "frozen"}, {"llama_model"}, 30),
    "vision": ({"vision": "full"}, {"llama_proj", "visual_encoder", "ln_vision"}, 2 + 45),
    "vision last": ({"vision": {"rule": "last", "blocks": 1}}, {"llama_proj", "visual_encoder"}, 2 + 13),
    "connector": ({"connector": "full"}, {"llama_proj", "Qformer", "query_tokens"}, 2 + 87),
    "connector last": ({"connector": {"rule": "last", "blocks": 1}}, {"llama_proj", "Qformer"}, 2 + 16),
    "connector lora": (
        {"connector": LORA | {"target_modules": ["query", "value"]}},
        {"llama_proj", "Qformer"},
        2 + 2 * 2 * 6,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_trains_its_part_and_leaves_the_rest_alone(case, build, pool):
    train, parts, count = CASES[case]
    model = build(**train)
    trained = model.trainable_parameters()
    assert {name.partition(".")[0] for name in trained} == parts
    assert len(trained) == count
    assert {id(p) for p in trained.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    for part in (model.visual_encoder, model.ln_vision, model.Qformer, model.llama_model):
        modes = {module.training for module in part.modules()}
        assert any(modes) == is_trained(part)
        assert all(modes) or not all(p.requires_grad for p in part.parameters())
    model(samples(pool, image=False))["loss"].backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"{name}, which a text does not reach"
        assert name.startswith("llama_model") or not parameter.grad.any(), name
    names = {id(p): name for name, p in trained.items()}
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer = torch.optim.SGD(model.get_optimizer_params(0.0), lr=0.1)
    for _ in range(2):  # LoRA's A moves once B is not 0
        optimizer.zero_grad()
        model(samples(pool))["loss"].backward()
        optimizer.step()
    changed = {names.get(id(own)) for own, old in zip(tensors, before, strict=True) if not torch.equal(own, old)}
    unmoved = {name for name in trained if name.endswith("key.bias")}  # it adds the same to all of a query's scores
    assert trained.keys() - unmoved <= changed <= trained.keys()


def test_dropout_of_adapters_acts_in_training_only(build, pool):
    model = build(llm=LORA | {"dropout": 0.5})
    for name, parameter in model.trainable_parameters().items():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.1)
    trained, evaluated = ([model.train(mode)(samples(pool))["loss"].item() for _ in range(2)] for mode in (True, False))
    assert trained[0] != trained[1]
    assert evaluated[0] == evaluated[1]
    assert not any(part.training for part in model.visual_encoder.modules())


def test_published_keys_are_these_rules(build_model):
    old = build_model(lora_r=4, lora_alpha=8, lora_dropout=0.0, freeze_qformer=False, **FROM_FILES)
    rule = LORA | {"target_modules": ["q_proj", "v_proj"]}
    new = build_model(train={"llm": rule, "connector": "full"}, **FROM_FILES)
    assert old.trainable_parameters().keys() == new.trainable_parameters().keys()
    assert {**old.made_with(), "x": 0} == {**new.made_with(), "x": 0}
    name = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert name in old.trainable_parameters(), "as in published checkpoints"


def test_16_bit_llm_with_adapters_computes_in_its_type(build, pool):
    model = build(llm=LORA, section={"llm_precision": "bf16"})
    assert {p.dtype for p in model.trainable_parameters().values()} == {torch.float32}
    seen = []
    layer = model.llama_model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda part, args, output: seen.append(output.dtype))
    model(samples(pool))["loss"].backward()
    assert seen == [torch.bfloat16]


def test_pure_bf16_trains_and_leaves_the_files_alone(build_model, parity_dir, pool, changed_llm):
    directory = changed_llm(lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    before = (directory / "model.safetensors").read_bytes()
    model = build_model(train={"llm": "full"}, llm_precision="bf16", llama_model=str(directory), **FROM_FILES).train()
    optimizer = torch.optim.AdamW(model.get_optimizer_params(0.0), lr=1e-2, fused=True)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(samples(pool))["loss"])
        losses[-1].backward()
        optimizer.step()
    assert {p.dtype for n, p in model.trainable_parameters().items() if "llama_model" in n} == {torch.bfloat16}
    assert losses[-1] < losses[0]
    assert (directory / "model.safetensors").read_bytes() == before


# The same as without this program


def plain_inputs(model, proj: nn.Linear, embedding: nn.Module, features, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and labels of a batch as anyone would write them."""
    embeds = embedding(batch.ids_BT).clone()
    tokens = proj(features).flatten(0, 1)
    embeds[batch.image_at] = tokens[batch.image_source]
    return embeds, batch.targets_BT


@pytest.mark.parametrize(
    ("section", "tolerance"),
    [
        ({"llm_packing": False, "llm_attention": "sdpa", "llm_logits": "all"}, 1e-6),
        ({}, 5e-6),
        ({"llm_grad_checkpoint": True, "llm_logits": "all"}, 5e-6),
    ],
)
@pytest.mark.parametrize("rule", ["lora", "full"])
def test_losses_are_those_of_a_plain_loop_around_transformers_and_peft(
    rule, section, tolerance, build, pool, parity_dir
):
    """Same start, same samples, 20 steps of AdamW with decay, clipped at 1."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # adapters begin at random
    model = build(llm=LORA if rule == "lora" else rule, section=section)
    llm = AutoModelForCausalLM.from_pretrained(parity_dir / "vicuna_tiny", dtype=torch.float32)
    if rule == "lora":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        llm = get_peft_model(llm, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
        theirs = {name: p for name, p in llm.named_parameters() if p.requires_grad}
        ours = {name.removeprefix("llama_model."): p for name, p in model.trainable_parameters().items()}
        for name, parameter in theirs.items():
            parameter.data.copy_(ours[name])
    proj = nn.Linear(*reversed(model.llama_proj.weight.shape))
    proj.load_state_dict(model.llama_proj.state_dict())
    features = model.image_features(pool[:4])
    loops = {}
    for who, parameters in (("ours", model.get_optimizer_params(0.1)), ("theirs", None)):
        modules = nn.ModuleList([llm, proj])
        if parameters is None:
            named = [(n, p) for n, p in modules.named_parameters() if p.requires_grad]
            decay = [p for n, p in named if "norm" not in n and "bias" not in n]
            plain = [p for n, p in named if "norm" in n or "bias" in n]
            parameters = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(parameters, lr=2e-3 if rule == "lora" else 2e-4)
        losses = []
        for step in range(STEPS):
            pick = torch.tensor([step % 3, step % 3 + 1])
            given = {"image": pool[pick], "answer": [f"a dog, number {step}", "two people walk"]}
            if who == "ours":
                loss = model(given)["loss"]
            else:
                batch, _ = model.training_batch(read_samples(given))
                embeds, labels = plain_inputs(model, proj, llm.get_input_embeddings(), features[pick], batch)
                loss = llm(inputs_embeds=embeds, attention_mask=batch.attention_mask_BT, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
            optimizer.step()
            losses.append(loss.item())
        loops[who] = losses
    assert loops["ours"] == pytest.approx(loops["theirs"], rel=tolerance)
    assert loops["ours"][-1] < loops["ours"][0] - 1


# Groups


PUBLISHED = {
    "freeze_all": {},
    "qformer_trainable": {"freeze_qformer": False},
    "vit_trainable": {"freeze_vit": False},
    "vit_trainable_noqformer": {"freeze_vit": False, "has_qformer": False},
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_what_takes_gradients_and_weight_decay_is_that_of_the_reference_in_its_order(build_model, golden, case):
    expected = golden["train"]["weight_decay_groups"][case]
    model = build_model(ckpt=None, **PUBLISHED[case])
    if case == "freeze_all":
        assert list(model.trainable_parameters()) == golden["checkpoints"]["trainable_parameters"]
    names = {id(parameter): name for name, parameter in model.trainable_parameters().items()}
    groups = [(g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in model.get_optimizer_params(0.05)]
    assert groups == [(0.05, expected["decay"]), (0, expected["no_decay"])]


def test_a_trained_qformer_has_dropout_in_train_mode_only(build_model, pool):
    model = build_model(ckpt=None, freeze_qformer=False)
    model.train()
    assert not torch.equal(model.encode_img(pool)[0], model.encode_img(pool)[0])
    model.eval()
    assert torch.equal(model.encode_img(pool)[0], model.encode_img(pool)[0])


def test_parts_with_a_rate_of_their_own_have_groups_of_their_own(build):
    model = build(llm=LORA | {"weight_decay": 0.5}, projection={"lr": 2e-5}, connector={"rule": "full", "lr": 1e-4})
    groups = [(g["weight_decay"], g.get("init_lr"), len(g["params"])) for g in model.get_optimizer_params(0.05)]
    counts = {
        part: sum(n.startswith(part) for n in model.trainable_parameters()) for part in ("llama_model", "Qformer")
    }
    assert groups[:2] == [(0.05, None, 0), (0, None, 0)]
    assert groups[-2:] == [(0.5, None, counts["llama_model"]), (0, None, 0)]
    assert [(decay, lr) for decay, lr, _ in groups[2:6]] == [(0.05, 1e-4), (0, 1e-4), (0.05, 2e-5), (0, 2e-5)]
    assert sum(count for *_, count in groups) == len(model.trainable_parameters())


def test_layer_that_reads_its_own_weights_is_named(build, pool):
    model = build(vision=LORA)
    model(samples(pool))["loss"].backward()
    with pytest.raises(RunError, match=r"visual_encoder.blocks.0.attn.qkv.lora_A.*no gradient reaches this adapter"):
        require_adapters_trained(model.trainable_parameters())
