"""`run.batch_invariant`: an answer and its numbers are the same to the bit in whatever company."""

import functools
from types import SimpleNamespace

import pytest
import torch
import yaml

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.conversation.decoding import Decoding
from minigpt4.inference.pipeline import PromptRules
from minigpt4.models.attention import MATMUL
from minigpt4.models.batch_decoder import BLOCK, BatchDecoder, GenerationState
from minigpt4.models.feature_cache import build_model, feature_cache
from minigpt4.models.generation import generate_ids
from minigpt4.processors import load_processor

TEXTS = [
    "<Img><ImageHere></Img> What is it?",
    "<Img><ImageHere></Img> Describe all that there is in this image, the people, the boats and the objects.",
    "<Img><ImageHere></Img>",
    "Say the one thing that you know: <Img><ImageHere></Img>",
]
COUNT = 16
CASES = [("minigpt4", "fp32"), ("minigpt4", "bf16"), ("llava", "fp32"), ("llava", "bf16")]


@pytest.fixture(scope="module")
def configure(tmp_path_factory, tiny_section, llava_section):
    """`configure(arch, precision, **run)`: a configuration with the switch on."""

    def read(arch="minigpt4", precision="fp32", model=None, **run):
        own = {"model_type": "pretrain_vicuna0" if arch == "minigpt4" else "v1", "arch": arch}
        section = (tiny_section if arch == "minigpt4" else llava_section)(**own, projection="linear")
        section |= {"llm_precision": precision, "vit_precision": precision} | (model or {})
        path = tmp_path_factory.mktemp("config") / "invariant.yaml"
        run = {"task": "image_text_pretrain", "device": "cpu", "batch_invariant": True} | run
        path.write_text(yaml.safe_dump({"model": section, "datasets": {}, "run": run}))
        return Config(SimpleNamespace(cfg_path=str(path), options=[])).validate(training=False)

    return read


@pytest.fixture(scope="module")
def built(configure):
    """`built(arch, precision)`: the model, which nobody changes."""
    return functools.cache(lambda arch, precision: build_model(configure(arch, precision), "cpu").eval())


@pytest.fixture(scope="module")
def asked(pool):
    """Images and texts of different lengths."""
    noise = torch.randn(COUNT, *pool.shape[1:], generator=torch.Generator().manual_seed(0))
    pixels = pool[torch.arange(COUNT) % len(pool)] + 0.5 * noise
    return pixels, [TEXTS[n % len(TEXTS)] for n in range(COUNT)]


def in_batches(size, function, *columns):
    """What a function of several columns gives for their rows, so many at a time."""
    cuts = [slice(n, n + size) for n in range(0, COUNT, size)]
    return [one for cut in cuts for one in function(*(column[cut] for column in columns))]


@pytest.mark.parametrize(("arch", "precision"), CASES)
def test_answers_are_the_same_in_batches_of_any_size(built, asked, arch, precision):
    model = built(arch, precision)

    def ask(pixels, texts):
        return model.generate(pixels, texts, max_new_tokens=10)

    alone = in_batches(1, ask, *asked)
    assert len(set(alone)) > COUNT // 2
    assert in_batches(4, ask, *asked) == in_batches(COUNT, ask, *asked) == alone


def test_so_are_those_of_a_search_with_several_beams(built, asked):
    model, (pixels, texts) = built("minigpt4", "fp32"), (own[:4] for own in asked)
    together = model.generate(pixels, texts, max_new_tokens=10, num_beams=3)
    alone = [model.generate(pixels[n : n + 1], [texts[n]], max_new_tokens=10, num_beams=3) for n in range(4)]
    assert [[one] for one in together] == alone


@pytest.mark.parametrize(("arch", "precision"), CASES)
def test_likelihoods_and_ranks_are_the_same_to_the_bit(built, asked, arch, precision):
    model, (pixels, texts) = built(arch, precision), asked
    answers = [["a dog", "two people and a boat on the water", "cat"][n % 3] for n in range(COUNT)]
    alone = in_batches(1, model.log_likelihoods, pixels, texts, answers)
    for size in (4, COUNT):
        assert in_batches(size, model.log_likelihoods, pixels, texts, answers) == alone
    candidates = [["a dog"] * COUNT, answers, ["a big yellow bus"] * COUNT]
    ranks = model.multi_select(pixels, texts, candidates, num_cand=[2, 3] * (COUNT // 2))
    assert [row for n in range(COUNT) for row in one_rank(model, pixels, texts, candidates, n)] == ranks


def one_rank(model, pixels, texts, candidates, n):
    own = [[column[n]] for column in candidates]
    return model.multi_select(pixels[n : n + 1], texts[n : n + 1], own, num_cand=[(2, 3)[n % 2]])


@pytest.mark.parametrize(("arch", "precision"), CASES)
def test_images_are_encoded_the_same_to_the_bit(built, asked, arch, precision):
    model, (pixels, _) = built(arch, precision), asked
    with torch.inference_mode():
        together = model.encode_img(pixels)[0]
        apart = torch.cat([model.encode_img(pixels[n : n + 1])[0] for n in range(COUNT)])
    assert torch.equal(together, apart)


def logits_of(model, prompts, limits):
    """Logits after each token of each prompt; rows join as soon as there is room, and leave at their limits."""
    llm, decoder = model.llama_model, BatchDecoder(model.llama_model, model.llama_tokenizer)
    states = [GenerationState(Decoding(max_new_tokens=limit)) for limit in limits]
    waiting, found, newest = list(range(len(states))), [[] for _ in states], {}
    decoder.end_ids = []

    def note(module, args, kwargs, output):
        rows = [states.index(row) for row in decoder.rows] if kwargs.get("inputs_embeds") is None else [joining]
        newest.update(zip(rows, output.logits[:, -1], strict=False))

    hook = llm.register_forward_hook(note, with_kwargs=True)
    while waiting or decoder.rows:
        if waiting and decoder.room:
            joining = waiting.pop(0)
            decoder.add([states[joining]], *prompts[joining])
        before = [states.index(row) for row in decoder.rows]
        decoder.step()
        for row in before:
            found[row].append(newest[row].clone())
    hook.remove()
    return [torch.stack(own) for own in found]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_the_same_to_the_bit_whoever_comes_and_goes(built, asked, precision):
    model, (pixels, texts) = built("minigpt4", precision), asked
    with torch.inference_mode():
        embeds = model.encode_img(pixels)[0].split(1)
        prompts = [model.prompt_embeds([text], [[own]]) for text, own in zip(texts, embeds, strict=True)]
        limits = [3 + 5 * n % 8 for n in range(COUNT)]
        alone = [logits_of(model, [prompt], [limit])[0] for prompt, limit in zip(prompts, limits, strict=True)]
        assert BLOCK < COUNT
        for together, own in zip(logits_of(model, prompts, limits), alone, strict=True):
            assert torch.equal(together, own)


def test_only_without_the_switch_sizes_of_products_depend_on_the_batch(built, asked):
    model, (pixels, texts) = built("minigpt4", "fp32"), asked
    shapes = set()
    linear = model.llama_model.get_decoder().layers[0].mlp.up_proj
    hook = linear.register_forward_pre_hook(lambda module, args: shapes.add(args[0].shape))

    def sizes(batch):
        shapes.clear()
        in_batches(batch, model.log_likelihoods, pixels, texts, ["a dog"] * COUNT)
        return set(shapes)

    assert sizes(1) == sizes(COUNT)
    model.llama_model.set_attn_implementation(MATMUL)
    try:
        assert sizes(1) != sizes(COUNT)
    finally:
        model.llama_model.set_attn_implementation("minigpt4_by_row")
        hook.remove()


def test_answers_are_those_of_the_usual_way_up_to_near_ties(built, model, asked):
    pixels, texts = asked[0][:6], asked[1][:6]
    prompts = model.prompt_embeds(texts, [[own] for own in model.encode_img(pixels)[0].split(1)])
    usual = generate_ids(model.llama_model, model.llama_tokenizer, *prompts, Decoding(max_new_tokens=12))
    own = built("minigpt4", "fp32")
    assert torch.equal(generate_ids(own.llama_model, own.llama_tokenizer, *prompts, Decoding(max_new_tokens=12)), usual)


def test_features_that_were_encoded_otherwise_are_not_taken_from_the_cache(configure, tmp_path):
    processor = load_processor("blip2_image_eval", {"image_size": 56})
    for switch in (True, False):
        feature_cache(configure(feature_cache=str(tmp_path), batch_invariant=switch)).store(processor)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change", [{"llm_attention": "eager"}, {"llm_cuda_graph": True}])
def test_an_llm_that_would_mix_its_rows_is_refused(configure, change):
    with pytest.raises(ConfigError, match="run.batch_invariant"):
        build_model(configure(model=change), "cpu")


def test_sampling_is_refused(configure):
    with pytest.raises(ConfigError, match="run.batch_invariant.*do_sample"):
        PromptRules.of(configure(), do_sample=True)
