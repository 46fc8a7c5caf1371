"""Where the model looks: maps against plain loops over the same numbers, on every kind of model; nearest words."""

import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.inference.attribution import Trace, answer_words, figures, grey, nearest_words, overlay
from minigpt4.models.prompting import ImageFeatures

ANSWER = "a red bus, and two owls"
PROMPT = "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "
PLAIN = {"has_qformer": False, "ckpt": None}
MODELS = {
    "qformer": {},
    "join4": {"has_qformer": False},
    "join2x2": {**PLAIN, "connector": "join2x2"},
    "identity with prefix": {**PLAIN, "connector": "identity", "vit_prefix": "keep"},
    "llava": {},
    "llava 1.5": {"projection": "mlp2x_gelu"},
}


@pytest.fixture(scope="module")
def built(shared_model, build_llava):
    """`built(name)`: a model that nobody changes."""

    @functools.cache
    def build(name):
        torch.manual_seed(0)  # of projections without a file
        return (build_llava if "llava" in name else shared_model)(**MODELS[name]).eval()

    return build


@pytest.fixture(scope="module")
def pixels(golden_tensors):
    return golden_tensors["images/img0/train"][None]


@pytest.fixture(params=list(MODELS))
def model(request, built):
    return built(request.param)


def log_prob(model, tokens_1NV, answer):
    """By the ordinary way of the model, from vision tokens."""
    features = ImageFeatures(model.connect(tokens_1NV))
    return model.log_likelihoods(features, [PROMPT], [answer])[0][0]


def test_maps_have_the_towers_grid_and_leave_no_trace(model, pixels):
    before = model.llama_model.config._attn_implementation
    said = model.generate(pixels, [PROMPT], max_new_tokens=8)
    trace = Trace(model, pixels.expand(2, -1, -1, -1), PROMPT.replace("What", "<ImageHere> What"), ANSWER)
    found = trace.maps([0])
    side = pixels.shape[-1] // 14
    assert {name: (own.shape, own.dtype) for name, own in found.items()} == dict.fromkeys(
        ("gradient", "attention"), ((2, side, side), np.dtype("float32"))
    )
    assert (found["attention"] >= 0).all()
    assert found["attention"].any()
    assert model.llama_model.config._attn_implementation == before
    assert all(p.grad is None for p in model.parameters())
    assert model.generate(pixels, [PROMPT], max_new_tokens=8) == said


def test_gradient_maps_are_finite_differences_of_log_probabilities(model, pixels):
    trace = Trace(model, pixels, PROMPT, ANSWER)
    last = len(trace.words) - 1
    with torch.no_grad():
        tokens_1NV = model.vision_tokens(pixels)
        assert trace.log_probs.sum() == pytest.approx(log_prob(model, tokens_1NV, ANSWER), abs=1e-4)
        first = tokens_1NV.shape[1] - trace.maps([0])["gradient"].size
        for words, said in ((range(last + 1), [ANSWER]), ([last], [ANSWER, ANSWER[: ANSWER.rindex(" ")]])):
            (map_hw,) = trace.maps(words)["gradient"]
            for patch, expected in list(enumerate(map_hw.flat))[::5]:
                ends = []
                for step in (0.02, -0.02):
                    scaled = tokens_1NV.clone()
                    scaled[:, first + patch] *= 1 + step
                    whole, *part = (log_prob(model, scaled, text) for text in said)
                    ends.append(whole - sum(part))
                scale = max(1e-2, float(np.abs(map_hw).max()))
                assert (ends[0] - ends[1]) / 0.04 == pytest.approx(expected, abs=0.03 * scale)


@pytest.mark.parametrize("name", ["qformer", "join4", "join2x2", "llava"])
def test_attention_maps_are_a_plain_loop_over_layers_heads_and_image_tokens(built, pixels, name):
    model = built(name)
    trace = Trace(model, pixels, PROMPT, ANSWER)
    word = trace.words[2]
    score = sum(trace._log_probs_K[token] for token in word.tokens)
    layers, columns = trace._attentions, trace._image_at.tolist()
    reached = [0.0] * len(columns)
    for layer in layers:
        (of_layer,) = torch.autograd.grad(score, layer, retain_graph=True)
        for head in range(layer.shape[1]):
            for token in word.tokens:
                row = trace._from[token]
                for index, column in enumerate(columns):
                    product = layer[0, head, row, column] * of_layer[0, head, row, column]
                    reached[index] += max(product.item(), 0) / layer.shape[1]
    count = pixels.shape[-1] // 14
    expected = np.zeros((count, count))
    if name == "qformer":
        for cross in trace._read:
            (of_cross,) = torch.autograd.grad(score, cross, retain_graph=True)
            product_QN = (cross * of_cross).clamp(min=0)[0].mean(0)
            for query, weight in enumerate(reached):
                expected += weight * product_QN[query, 1:].view(count, count).numpy(force=True)
    else:
        for patch in range(count * count):
            row, column = divmod(patch, count)
            squares = count // 2 * (row // 2) + column // 2
            token, size = {"join4": (patch // 4, 4), "join2x2": (squares, 4), "llava": (patch, 1)}[name]
            expected[row, column] = reached[token] / size
    np.testing.assert_allclose(trace.maps([2])["attention"][0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["qformer", "llava"])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ANSWER, ["a", "red", "bus", ",", "and", "two", "owls"]),
        ("It's well-known: 3.5 \u2603 cats!", ["It's", "well-known", ":", "3", ".", "5", "\u2603", "cats", "!"]),
        ("  <b>x</b>\n\ny ", ["<", "b", ">", "x", "</", "b", ">", "y"]),
        ("", []),
    ],
)
def test_every_token_belongs_to_the_word_it_begins(built, name, answer, words):
    model = built(name)
    found = answer_words(model, answer)
    assert [word.text for word in found] == words
    tokens = [token for word in found for token in word.tokens]
    ids = model.prompting.encode([answer])[0]
    assert tokens == list(range(len(tokens)))
    assert not model.llama_tokenizer.decode(ids[len(tokens) :]).strip()


@pytest.mark.parametrize("name", ["qformer", "llava"])
def test_nearest_words_are_those_of_a_plain_loop_over_cosines(built, pixels, name):
    model = built(name)
    tokenizer, table = model.llama_tokenizer, model.llama_model.get_input_embeddings().weight
    with torch.no_grad():
        embeds_QD = model.encode_img(pixels)[0][0]
    for embed, near in zip(embeds_QD[:3], nearest_words(model, embeds_QD, 2)[:3], strict=True):
        cosines = []
        for token in range(len(tokenizer)):
            dot = sum((embed * table[token]).tolist())
            lengths = [math.sqrt(sum(x * x for x in vector.tolist())) for vector in (embed, table[token])]
            cosines.append((dot / max(lengths[0] * lengths[1], 1e-12), tokenizer.decode([token]).strip()))
        best = sorted(cosines, reverse=True)[:2]
        assert [cosine for _, cosine in near] == pytest.approx([cosine for cosine, _ in best], abs=1e-5)
        assert [word for word, _ in near] == [word for _, word in best]


# The Python API, and pictures


def test_a_pipeline_looks_for_its_own_caption_or_another_answer(tiny, files, tmp_path):
    said = tiny.caption(files[0])
    look = tiny.look(files[0])
    assert look.answer == said
    look = tiny.look(Image.open(files[0]), answer="<i>red</i> bus")
    assert look.words == ["<", "i", ">", "red", "</", "i", ">", "bus"]
    assert {name: own.shape for name, own in look.maps.items()} == dict.fromkeys(("gradient", "attention"), (8, 4, 4))
    assert (look.log_probs < 0).all()
    assert len(look.nearest) == 8
    assert tiny.caption(files[0]) == said
    look.save(tmp_path / "look.html")
    text = (tmp_path / "look.html").read_text(encoding="utf-8")
    assert "&lt;i&gt;red" in text
    assert "<i>" not in text
    assert text.count("<img ") == 16
    assert text.count("<tr>") == 8
    assert look.overlay("attention", 3).size == (224, 224)
    assert tiny.look(files[0], answer="").maps == {}
    with pytest.raises(SampleError, match=r"images\[0\]"):
        tiny.look(3)
    with pytest.raises(ConfigError, match=r"look\(\): 'What\?' must hold <ImageHere>"):
        tiny.look(files[0], "What?")


def test_an_overlay_marks_what_is_positive_and_words_are_escaped():
    picture = grey(torch.linspace(-1, 1, 56 * 56).view(1, 56, 56).expand(3, -1, -1))
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert picture.getpixel((55, 55)) == (255, 255, 255)
    maps = np.array([[[0, -1]], [[2, 0]]], dtype=np.float32)
    plain, peak = (np.asarray(overlay(picture, map_hw)).astype(int) for map_hw in maps)
    assert plain.shape == (224, 224, 3)
    assert (np.ptp(plain, axis=2) == 0).all()
    red = peak[..., 0] - peak[..., 2]
    assert red[:, :50].min() > 90
    assert red[:, -50:].max() < 10
    assert "<b>" not in figures("<b>", [])
    assert "&lt;b&gt;" in figures("<b>", [])
