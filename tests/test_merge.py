"""`python -m minigpt4.merge` and LLaVA's layouts: what is written is what the reference writes, and reads back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt4 import export, merge
from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError, WeightsError
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.models.fsdp import whole
from minigpt4.models.llava_weights import read_lora

RULE = {"rule": "lora", "r": 4, "alpha": 8, "dropout": 0.0}
LOGITS_ATOL = 1e-5


@pytest.fixture(scope="module")
def samples() -> dict:
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A brown dog on the beach."}]
    return {"image": pixels, "conversations": [turns, turns], "image_id": ["a", "b"]}


@pytest.fixture(scope="module")
def adapters(llava_dir) -> Path:
    return llava_dir / "lora" / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def with_lora(build_llava, adapters):
    """The reference's LoRA folder, read."""
    return build_llava(train={"llm": RULE}, ckpt=str(adapters)).eval()


def logits(model, samples) -> torch.Tensor:
    """Of a prompt with an image."""
    caught = []
    handle = model.llama_model.get_output_embeddings().register_forward_hook(lambda *a: caught.append(a[2]))
    with torch.no_grad():
        model.generate(samples["image"], ["<image>\nWhat is it?"] * 2, max_new_tokens=2)
    handle.remove()
    return torch.cat([one.flatten(0, 1) for one in caught])


def trained(model, samples):
    """After a step."""
    optimizer = torch.optim.AdamW(model.train().get_optimizer_params(0.1), lr=1e-3)
    model(samples)["loss"].backward()
    optimizer.step()
    return model.eval()


def saved(model, path: Path) -> Path:
    torch.save({"model": {name: whole(p) for name, p in model.stored_parameters().items()}}, path)
    return path


def test_published_adapters_are_read_and_their_merge_says_the_same(
    with_lora, llava_dir, llava_section, write_recipe, build_llava, adapters, samples, tmp_path
):
    section = llava_section(model_type="v1", image_size=56, train={"llm": RULE})
    recipe = write_recipe(tmp_path, section)
    output = tmp_path / "merged"
    assert merge.main(["--cfg-path", str(recipe), "--ckpt", str(adapters), "--output", str(output)]) == 0
    merged = build_llava(llama_model=str(output), ckpt=str(output / "projection.pth")).eval()
    torch.testing.assert_close(logits(merged, samples), logits(with_lora, samples), rtol=0, atol=LOGITS_ATOL)
    name = "model.layers.1.self_attn.q_proj.weight"
    wanted = load_file(llava_dir / "golden_train.safetensors")[f"train/lora/merged/{name}"]
    torch.testing.assert_close(dict(merged.llama_model.named_parameters())[name].detach(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["full", RULE, {"rule": "last", "blocks": 2}], ids=["full", "lora", "last"])
def test_whole_llava_is_as_the_reference_writes_it(rule, build_llava, llava_dir, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "SHARD_SIZE", "300KB")
    model = trained(build_llava(train={"llm": rule}, ckpt_allow_keys=["llama_model.*"]), samples)
    output = tmp_path / "llava-tiny"
    merge.merge(model.cfg, saved(model, tmp_path / "checkpoint.pth"), output, "llava")
    shards = sorted(output.glob("*.safetensors"))
    written = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    reference = load_file(llava_dir / "stage2_linear" / "model.safetensors")
    assert len(shards) > 2
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in reference.items()}
    theirs = json.loads((llava_dir / "stage2_linear" / "config.json").read_text())
    ours = json.loads((output / "config.json").read_text())
    assert {key for key in theirs if key.startswith(("mm_", "tokenizer", "use_mm", "image"))} <= ours.keys()
    again = build_llava(llama_model=str(output), ckpt=None).eval()
    torch.testing.assert_close(logits(again, samples), logits(model, samples), rtol=0, atol=LOGITS_ATOL)


def test_lora_folder_is_as_the_reference_writes_it(with_lora, llava_dir, adapters, tmp_path):
    output = tmp_path / "llava-lora"
    merge.merge(with_lora.cfg, saved(with_lora, tmp_path / "checkpoint.pth"), output, "lora")
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        read = load_file if name.endswith("safetensors") else torch.load
        ours, theirs = read(output / name), read(llava_dir / "lora" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (output, llava_dir / "lora"))
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    assert (ours["r"], ours["lora_alpha"]) == (theirs["r"], theirs["lora_alpha"])


def test_adapters_alone_go_with_the_projection_of_the_whole_llava_below(
    llava_dir, llava_section, write_recipe, adapters, tmp_path
):
    alone = tmp_path / "lora" / adapters.name
    alone.parent.mkdir()
    for file in (adapters, adapters.with_name("adapter_config.json")):
        shutil.copy(file, alone.parent)
    section = llava_section(train={"llm": RULE}, llama_model=str(llava_dir / "stage2_linear"))
    section |= {"ckpt_allow_keys": ["llama_proj.*"]}
    config = bind(LlavaConfig, section | {"ckpt": None}, section="model", source="test")
    merge.merge(config, alone, tmp_path / "whole", "llava")
    recipe = write_recipe(tmp_path, section | {"model_type": "v1", "ckpt": str(alone)}, device="cpu")
    assert export.main([str(recipe), "--format", "llava", "--output", str(tmp_path / "stock")]) == 0
    base = load_file(llava_dir / "stage2_linear" / "model.safetensors")["model.mm_projector.weight"]
    for folder, name in (("whole", "model.mm_projector"), ("stock", "multi_modal_projector.linear_1")):
        assert torch.equal(load_file(tmp_path / folder / "model.safetensors")[f"{name}.weight"], base)


def test_projector_alone_is_a_file_that_stage_2_reads(build_llava, llava_dir, tmp_path):
    model = build_llava()
    merge.merge(model.cfg, saved(model, tmp_path / "checkpoint.pth"), tmp_path / "out", "llm")
    ours, theirs = torch.load(tmp_path / "out" / "mm_projector.bin"), torch.load(llava_dir / "projector_linear.bin")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].float()) for key in theirs)


FAULTS = {
    "missing": (lambda s: s.pop(min(s)), WeightsError, "missing: llama_model.*lora_A"),
    "surplus": (lambda s: s.update({f"{min(s)}.x": torch.ones(1)}), WeightsError, "not expected: llama_model"),
    "shape": (lambda s: s.update({min(s): torch.ones(3, 112)}), WeightsError, "wrong shape: llama_model"),
    "nan": (lambda s: s[min(s)].fill_(float("nan")), WeightsError, "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_checkpoint_with_a_fault_is_refused_by_load_and_merge(fault, with_lora, build_llava, tmp_path):
    change, error, text = FAULTS[fault]
    state = {name: whole(p) for name, p in with_lora.stored_parameters().items()}
    change(state)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state}, path)
    with pytest.raises(error, match=text):
        build_llava(train={"llm": RULE}, ckpt=str(path))
    with pytest.raises(error, match=text):
        merge.merge(with_lora.cfg, path, tmp_path / "out", "llm")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_dora": True}, "use_dora: True is not read here"),
        ({"bias": "all"}, "bias: 'all' is not read here"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"lora_alpha": 16}, r"adapters were trained with alpha 16.0, and model.train.llm.alpha is 8.0"),
    ],
)
def test_adapters_of_another_kind_are_refused(changes, text, adapters, build_llava, llava_section, tmp_path):
    path = shutil.copytree(adapters.parent, tmp_path, dirs_exist_ok=True) / adapters.name
    config = json.loads(adapters.with_name("adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    section = llava_section(train={"llm": RULE}, ckpt=str(path))
    with pytest.raises(WeightsError, match=text):
        build_llava(**section)
    with pytest.raises(WeightsError, match=text):
        merge.merge(bind(LlavaConfig, section, section="model", source="test"), path, tmp_path / "out", "llm")


def test_what_a_layout_or_a_folder_cannot_hold_is_refused(with_lora, build_llava, adapters, tmp_path):
    model, path = build_llava(ckpt=None, train={"llm": RULE, "vision": {"rule": "full"}}), tmp_path / "checkpoint.pth"
    with pytest.raises(ConfigError, match="--layout llava: has no place for visual_encoder"):
        merge.merge(model.cfg, saved(model, path), tmp_path / "out", "llava")
    state = {name: whole(p) for name, p in with_lora.stored_parameters().items()}
    for content, text in (
        ({"model": state | {"visual_encoder.x": torch.ones(1)}}, "not expected: visual_encoder.x"),
        ({"model": {n: t for n, t in state.items() if "llama_proj" not in n}}, "missing: llama_proj"),
        ({"model": state, "state": {"made_with": {"llm_fingerprint": "of another"}}}, "was trained with the LLM"),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=text):
            merge.merge(with_lora.cfg, path, tmp_path / "out", "llava")
    with pytest.raises(ConfigError, match="--output .* is not empty"):
        merge.merge(with_lora.cfg, adapters, tmp_path, "llm")


def test_other_things_beside_the_adapters_are_refused(adapters, tmp_path):
    shutil.copytree(adapters.parent, tmp_path, dirs_exist_ok=True)
    torch.save({"base_model.model.model.norm.weight": torch.ones(3)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(WeightsError, match="norm.weight is no weight of a projector"):
        read_lora(tmp_path / adapters.name)
