"""The model in other precisions, with other parts, and around other LLMs."""

import pytest
import timm
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt4.models.prompting import read_samples
from minigpt4.models.tokenizer import hidden_pad_id

BF16, FP16 = torch.bfloat16, torch.float16
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def samples(pool):
    return {"image": pool[:2], "answer": ["a brown dog", "a cat on a mat"]}


def backward(model, samples):
    """Loss and gradients by name of one training step."""
    model.train()
    loss = model(samples)["loss"]
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.trainable_parameters().items()}


def relative_error(actual, expected):
    """Root mean square error over the standard deviation of what is expected."""
    return ((actual - expected).pow(2).mean().sqrt() / expected.std()).item()


# Precision of the frozen vision side


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", FP16), ("bf16", BF16), ("fp32", torch.float32)])
def test_frozen_vision_stores_matmuls_in_its_precision_and_the_rest_in_fp32(shared_model, precision, dtype):
    model = shared_model(vit_precision=precision)
    matmuls, others = set(), {model.query_tokens.dtype, model.visual_encoder.model.pos_embed.dtype}
    for part in (model.visual_encoder, model.ln_vision, model.Qformer):
        for module in part.modules():
            kind = matmuls if isinstance(module, nn.Linear | nn.Conv2d) else others
            kind.update(parameter.dtype for parameter in module.parameters(recurse=False))
    assert matmuls == {dtype}
    assert others == {torch.float32}


@pytest.mark.parametrize("changes", [{"freeze_vit": False}, {"freeze_qformer": False}])
def test_trained_vision_is_stored_in_fp32(build_model, changes):
    model = build_model(ckpt=None, vit_precision="bf16", **changes)
    assert {parameter.dtype for parameter in model.trainable_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("has_qformer", [True, False])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@torch.no_grad()
def test_image_tokens_in_16_bits_are_close_to_those_in_fp32(shared_model, pool, precision, has_qformer):
    expected = shared_model(has_qformer=has_qformer).encode_img(pool)[0]
    embeds = shared_model(has_qformer=has_qformer, vit_precision=precision).encode_img(pool)[0]
    # Each layer rounds its result once and the errors add up like a random walk: about 2 roundoffs after the
    # 3 to 7 layers here (measured 1.6 and 2.0); 4 leaves room for other CPUs, and a wrong layer gives hundreds.
    assert embeds.dtype == torch.float32
    assert 0 < relative_error(embeds, expected) < 4 * UNIT_ROUNDOFF[precision]


def test_training_in_autocast_keeps_projection_and_gradient_in_fp32(build_model, samples):
    model = build_model(vit_precision="bf16", llm_precision="bf16")
    with torch.autocast("cpu", dtype=BF16):
        assert model.encode_img(samples["image"])[0].dtype == BF16
        _, grads = backward(model, samples)
    assert {name: grad.dtype for name, grad in grads.items()} == dict.fromkeys(grads, torch.float32)


# Precision and memory of the LLM


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_llm_in_16_bits_trains_the_fp32_projection(build_model, samples, precision):
    loss, grads = backward(build_model(llm_precision=precision), samples)
    expected, reference = backward(build_model(), samples)
    assert loss.dtype == torch.float32
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        # Forward and backward through 3 layers of about 8 rounded results each: measured 5 roundoffs.
        assert relative_error(grad, reference[name]) < 12 * UNIT_ROUNDOFF[precision]
    torch.testing.assert_close(loss, expected, rtol=2 * UNIT_ROUNDOFF[precision], atol=0)


@pytest.mark.parametrize(
    ("precision", "amp", "expected"), [("fp16", BF16, FP16), ("bf16", FP16, BF16), ("fp32", BF16, BF16)]
)
def test_llm_in_16_bits_computes_as_stored_and_one_in_fp32_follows_autocast(
    build_model, samples, precision, amp, expected
):
    model, computed = build_model(llm_precision=precision), set()
    layer = model.llama_model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _, inputs, output: computed.add(output.dtype))
    with torch.autocast("cpu", dtype=amp):
        model(samples)
        for num_beams in (1, 2):
            model.generate(samples["image"], ["<Img><ImageHere></Img>"] * 2, num_beams=num_beams, max_new_tokens=2)
    assert computed == {expected}


@pytest.mark.parametrize(("amp", "expected"), [(True, BF16), (False, torch.float32)])
def test_a_trained_qformer_computes_as_the_run_says_beside_a_frozen_fp16_vit(build_model, samples, amp, expected):
    model = build_model(vit_precision="fp16", freeze_qformer=False, ckpt=None)
    computed = {}
    parts = {"vit": model.visual_encoder.model.blocks[0].mlp.fc1}
    parts["qformer"] = model.Qformer.bert.encoder.layer[0].attention.attention.query
    for name, part in parts.items():
        part.register_forward_hook(lambda _, inputs, output, name=name: computed.update({name: output.dtype}))
    with torch.autocast("cpu", dtype=BF16, enabled=amp):
        loss, grads = backward(model, samples)
    assert computed == {"vit": torch.float16, "qformer": expected}
    assert loss.isfinite()
    assert grads["query_tokens"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "switch"),
    [({}, {"llm_grad_checkpoint": True}), ({"freeze_vit": False, "ckpt": None}, {"use_grad_checkpoint": True})],
)
def test_gradient_checkpointing_computes_layers_again_and_changes_no_number(build_model, samples, changes, switch):
    plain, model = build_model(**changes), build_model(**changes, **switch)
    model.llama_proj.load_state_dict(plain.llama_proj.state_dict())
    vit, llm = model.visual_encoder.model.blocks[0], model.llama_model.model.layers[0].mlp
    runs = []
    (vit if changes else llm).register_forward_pre_hook(lambda *_: runs.append(1))
    loss, grads = backward(plain, samples)
    again, regrads = backward(model, samples)
    assert len(runs) == 2 + (not changes)  # the LLM also reads the prefix
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], regrads[name]) for name in grads)


# Other parts


def assert_projection_trains(model, samples, names):
    """All of these layers (their names are "" where it is one), and nothing else."""
    loss, grads = backward(model, samples)
    assert loss.isfinite()
    assert list(grads) == [f"llama_proj.{name}{kind}" for name in names for kind in ("weight", "bias")]
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_three_projection_layers_train(build_model, samples):
    assert_projection_trains(build_model(proj_layers=3, ckpt=None), samples, ["0.", "1.", "2."])


def test_any_timm_model_without_qformer_trains(build_model, tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "vit.pth")
    tower = {"vit_model": "resnet10t", "vit_config": {}, "vit_weights": str(tmp_path / "vit.pth"), "image_size": 64}
    model = build_model(**tower, has_qformer=False, ckpt=None)
    assert_projection_trains(model, {"image": torch.randn(2, 3, 64, 64), "answer": ["a dog", "a cat"]}, [""])
    assert model.llama_proj.weight.shape == (96, 4 * 512)


def test_llm_learns_from_the_patches_of_a_clip_directory(build_model, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=14, image_size=56)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    tower = {"vit_model": str(tmp_path), "vit_config": {}, "vit_weights": None, "image_size": None}
    model = build_model(**tower, connector="identity", projection="mlp2x_gelu", vit_layer=-2, ckpt=None)
    assert_projection_trains(model, {"image": torch.randn(2, 3, 56, 56), "answer": ["a dog", "a cat"]}, ["0.", "2."])


@pytest.mark.parametrize(("size", "patches", "used"), [(42, 9, 8), (70, 25, 24)])
@torch.no_grad()
def test_patches_that_fill_no_group_of_four_are_left_out(shared_model, size, patches, used):
    model = shared_model(image_size=size, has_qformer=False)
    image = torch.randn(1, 3, size, size)
    tokens = model.ln_vision(model.visual_encoder(image))[:, 1:]
    assert tokens.shape[1] == patches
    expected = model.llama_proj(tokens[:, :used].reshape(1, used // 4, -1))
    torch.testing.assert_close(model.encode_img(image)[0], expected)


# An LLM whose tokenizer knows bytes, adds no bos, and has no `$$`


@pytest.fixture(scope="module")
def byte_level_llm(tmp_path_factory, byte_level_bpe):
    directory = tmp_path_factory.mktemp("byte_level_llm")
    backend = byte_level_bpe("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**sizes, **tokens, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def byte_level_model(build_model, byte_level_llm):
    return build_model(
        llama_model=byte_level_llm, ckpt=None, end_sym="<|im_end|>", prompt_template="tokenizer", chat_template=True
    )


def test_tokenizer_without_bos_gives_batches_without_a_bos_column(byte_level_model, pool):
    tokenizer = byte_level_model.llama_tokenizer
    assert byte_level_model.prompt_template == "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    image_only, _ = byte_level_model.training_batch(read_samples({"image": pool[:1], "answer": ["a dog"]}))
    assert image_only.image_at[1].tolist() == list(range(8))
    instructed, _ = byte_level_model.training_batch(read_samples({"answer": ["a dog"], "instruction_input": "Say. "}))
    text = "<|im_start|>user\nSay. <|im_end|>\n<|im_start|>assistant\na dog<|im_end|>"
    assert tokenizer.decode(instructed.ids_BT[0]) == text


def test_end_token_that_is_also_the_padding_stays_a_target(byte_level_model, pool):
    tokenizer = byte_level_model.llama_tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert hidden_pad_id(tokenizer) is None
    batch, _ = byte_level_model.training_batch(read_samples({"image": pool[:2], "answer": ["a", "a dog and a cat"]}))
    for targets, mask in zip(batch.targets_BT, batch.attention_mask_BT, strict=True):
        trained = targets[targets != -100].tolist()
        assert trained[-1] == tokenizer.eos_token_id
        assert trained.count(tokenizer.eos_token_id) == 1
        assert mask.sum() == 8 + len(trained)


def test_end_token_inside_a_conversation_is_a_target_and_attended_to(byte_level_model):
    conversation = {"conv_q": ["One? !@#Two? "], "conv_a": ["a!@#b"], "connect_sym": ["!@#"]}
    batch, _ = byte_level_model.training_batch(read_samples(conversation))
    end = byte_level_model.llama_tokenizer.eos_token_id
    assert batch.targets_BT[0].tolist().count(end) == 2
    assert batch.attention_mask_BT.bool().all()


def test_byte_level_llm_trains_and_answers(byte_level_model, pool):
    text = "<Img><ImageHere></Img> What? "
    loss, grads = backward(byte_level_model, {"image": pool[:1], "answer": ["a dog"], "instruction_input": [text]})
    assert loss.isfinite()
    assert grads["llama_proj.weight"].abs().max() > 0
    answers = byte_level_model.generate(pool[:2], [byte_level_model.prompt_template.format(text)] * 2)
    assert len(answers) == 2
    assert not any("<|im_end|>" in answer for answer in answers)
