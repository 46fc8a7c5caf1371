"""`--format gguf`: other readers make of the two files what this package makes of the model.

The LLM's file is read by transformers' own GGUF loader, `mmproj` by a forward pass after llama.cpp's graph, written
here from its names. llama.cpp itself is asked where llama-cpp-python is installed, which compiles it: no extra has it.
"""

import importlib.util
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from minigpt4 import export
from minigpt4.inference.pipeline import Pipeline
from minigpt4.models.gguf_layout import LANGUAGE_MODEL, PROJECTOR
from minigpt4.models.llama_tokenizer import PROBES

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = {"rule": "lora", "r": 4, "alpha": 8, "dropout": 0.0}
V1 = {"arch": "llava", "model_type": "v1", "image_size": 56, "image_aspect_ratio": "pad"}
MODELS = {
    "linear": V1,
    "mlp2x_gelu": V1 | {"model_type": "v1.5", "projection": "mlp2x_gelu"},
    "siglip": V1,
    "lora": V1 | {"train": {"llm": LORA}},
    "last layer": V1 | {"vit_layer": -1},
}
LOGITS_ATOL, EMBEDS_ATOL = 1e-4, 5e-3
"""The second is what a GELU of tanh costs against the exact one."""


@pytest.fixture(scope="module")
def world(tmp_path_factory, llava_section, llava_dir, siglip_tower, write_recipe) -> dict[str, Path]:
    """The YAML of each model, exported to `out` beside it in fp32."""
    folder, files = tmp_path_factory.mktemp("gguf"), {}
    for name, changes in MODELS.items():
        section, place = llava_section(**changes), folder / name
        if name == "lora":
            section["ckpt"] = str(llava_dir / "lora" / "adapter_model.safetensors")
        if name == "siglip":
            section["vit_model"] = siglip_tower
        files[name] = write_recipe(place, section, device="cpu")
        assert export.main([str(files[name]), "--format", "gguf", "--output", str(place / "out")]) == 0
    return files


@pytest.fixture
def picture(parity_dir) -> Image.Image:
    """Of the towers' size, so that nobody resizes."""
    return Image.open(parity_dir / "images" / "img3_rgb.png")


def write_bpe(folder: Path, cut: pre_tokenizers.PreTokenizer) -> str:
    """A tiny LLaMA with a byte-level BPE, whose text is cut by `cut` first."""
    bytewise, marks = pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, bytewise]) if cut else bytewise
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["Describe this picture of 12 things, and that one."], trainer)
    names = {"bos_token": marks[1], "eos_token": marks[2], "unk_token": marks[0], "pad_token": marks[2]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": backend.get_vocab_size(), "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize(
    ("cut", "name"), [(None, "gpt-2"), (pre_tokenizers.Digits(True), "smollm"), (pre_tokenizers.Punctuation(), None)]
)
def test_byte_level_tokenizers_are_written_or_refused(cut, name, llava_section, write_recipe, tmp_path, capsys):
    llm = write_bpe(tmp_path / "llm", cut)
    recipe = write_recipe(tmp_path, llava_section(**V1 | {"llama_model": llm, "conv_template": "mpt"}), device="cpu")
    done = export.main([str(recipe), "--format", "gguf", "--output", str(tmp_path / "out")])
    if name is None:
        assert done == 2
        assert "neither SentencePiece nor byte-level BPE" in capsys.readouterr().err
        return
    assert done == 0
    facts, _ = values(tmp_path / "out" / LANGUAGE_MODEL)
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert facts["tokenizer.ggml.add_bos_token"] is False
    mine = AutoTokenizer.from_pretrained(llm)
    assert facts["tokenizer.ggml.tokens"][: len(mine)] == mine.convert_ids_to_tokens(range(len(mine)))
    ids = torch.tensor([[5, 9, 7]])
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", gguf_file=LANGUAGE_MODEL, dtype=torch.float32)
    wanted = LlamaForCausalLM.from_pretrained(llm)(input_ids=ids).logits
    found = theirs(input_ids=ids).logits[..., : wanted.shape[-1]]
    torch.testing.assert_close(found, wanted, rtol=0, atol=LOGITS_ATOL)


def ours(file: Path) -> Pipeline:
    return Pipeline(export.source_of(str(file), None, []), "cpu")


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "lora"])
def test_transformers_reads_the_llm(name, world):
    out, mine = world[name].parent / "out", ours(world[name]).model
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=LANGUAGE_MODEL)
    ids = torch.tensor([mine.llama_tokenizer("Describe this picture.")["input_ids"]])
    assert tokenizer("Describe this picture.")["input_ids"] == ids[0].tolist()
    llm = AutoModelForCausalLM.from_pretrained(out, gguf_file=LANGUAGE_MODEL, dtype=torch.float32)
    wanted = mine.llama_model(input_ids=ids).logits
    torch.testing.assert_close(llm(input_ids=ids).logits[..., : wanted.shape[-1]], wanted, rtol=0, atol=LOGITS_ATOL)


def values(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(np.array(tensor.data)).float() for tensor in reader.tensors}


def as_llama_cpp(path: Path, pixels_3SS: torch.Tensor) -> torch.Tensor:
    """Image tokens (Q, E) of an `mmproj` after the graph of llama.cpp's LLaVA, its class token before the patches."""
    facts, weights = values(path)
    heads, eps = (facts[f"clip.vision.attention.{key}"] for key in ("head_count", "layer_norm_epsilon"))
    (depth,) = facts["clip.vision.feature_layer"]
    assert facts["clip.vision.block_count"] == depth
    act = (lambda x: F.gelu(x, approximate="tanh")) if facts["clip.use_gelu"] else (lambda x: x * (1.702 * x).sigmoid())

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    patch = weights["v.patch_embd.weight"]
    x_ND = F.conv2d(pixels_3SS[None], patch, weights.get("v.patch_embd.bias"), patch.shape[-1])[0].flatten(1).T
    has_class = "v.class_embd" in weights
    if has_class:
        x_ND = torch.cat([weights["v.class_embd"][None], x_ND])
    x_ND = x_ND + weights["v.position_embd.weight"]
    if "v.pre_ln.weight" in weights:
        x_ND = norm(x_ND, "v.pre_ln")
    for layer in range(depth):
        block = f"v.blk.{layer}"
        parts = [linear(norm(x_ND, f"{block}.ln1"), f"{block}.attn_{part}") for part in "qkv"]
        parts = [part.unflatten(1, (heads, -1)).transpose(0, 1) for part in parts]
        attended = F.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1)
        x_ND = x_ND + linear(attended, f"{block}.attn_out")
        x_ND = x_ND + linear(act(linear(norm(x_ND, f"{block}.ln2"), f"{block}.ffn_up")), f"{block}.ffn_down")
    hidden = F.gelu(linear(x_ND[int(has_class) :], "mm.0"), approximate="tanh")
    return linear(hidden, "mm.2")


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_mmproj_gives_the_image_tokens(name, world, picture):
    mine = ours(world[name])
    pixels = mine.processor(picture)
    wanted = mine.model.project(mine.model.image_features(pixels[None]))[0]
    found = as_llama_cpp(world[name].parent / "out" / PROJECTOR, pixels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=EMBEDS_ATOL)


def test_files_say_what_llama_cpp_asks(world):
    facts, _ = values(world["linear"].parent / "out" / LANGUAGE_MODEL)
    tokens, kinds = (facts[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.add_bos_token"]) == ("llama", True)
    assert len(tokens) == facts["llama.vocab_size"]
    assert kinds[tokens.index("<image>")] == kinds[tokens.index("</s>")] == gguf.TokenType.CONTROL
    assert kinds[tokens.index("<0x0A>")] == gguf.TokenType.BYTE
    assert "USER" in facts["tokenizer.chat_template"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_is_that_of_matrices(precision, world, tmp_path):
    command = [str(world["mlp2x_gelu"]), "--format", "gguf", "--output", str(tmp_path / "new")]
    assert export.main([*command, "--precision", precision]) == 0
    kind = {"fp16": "F16", "bf16": "BF16"}[precision]
    for name in (LANGUAGE_MODEL, PROJECTOR):
        tensors = gguf.GGUFReader(tmp_path / "new" / name).tensors
        kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
        assert {own for tensor, own in kinds.items() if "norm" in tensor or tensor.endswith("bias")} == {"F32"}
        matrices = ("_q.weight", "ffn_up.weight", "mm.0.weight")
        assert {own for tensor, own in kinds.items() if tensor.endswith(matrices)} == {kind}


def test_without_the_package_the_command_to_install_it_is_named(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export.main([str(world["linear"]), "--format", "gguf", "--output", str(tmp_path / "out")]) == 2
    assert "[gguf]" in capsys.readouterr().err


# llama.cpp itself


@pytest.fixture(scope="module")
def parity(load_script):
    """`benchmarks/gguf_parity.py`."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python, which compiles llama.cpp: pip install llama-cpp-python")
    return load_script("benchmarks/gguf_parity.py")


def test_llama_cpp_reads_a_siglip_llava_as_we_do(parity, world, picture):
    """CLIP's patches it puts one place off (llama.cpp, issue 25814); SigLIP has no token before them."""
    found = parity.compare(ours(world["siglip"]), world["siglip"].parent / "out", [picture], 20)
    assert found["largest difference"] < EMBEDS_ATOL
    assert found["text same"] + found["image same"] >= 0.97 * (found["text"] + found["image"])  # untrained: near ties


def test_llama_cpp_cuts_texts_as_we_do(parity, world):
    llama = parity.LlamaCpp(world["linear"].parent / "out", 512)
    tokenizer = ours(world["linear"]).model.llama_tokenizer
    for probe in PROBES:
        text = probe.replace("\x00", "")
        assert llama.llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"]
