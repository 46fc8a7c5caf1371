"""Answers from embeddings: settings, stops and ends against a plain loop, and what an answer costs."""

import copy
from contextlib import contextmanager

import pytest
import torch

from minigpt4.common.errors import ConfigError, MiniGPT4Error
from minigpt4.models.batch_decoder import ROOM, TOP_K, BatchDecoder, GenerationState
from minigpt4.models.generation import Decoding, StopOnText, generate_ids

BOS, EOS, PAD = 1, 2, 0
TEXTS = [
    "###Human: Hi ###Assistant: ",
    "###Human: Describe the picture with all the people, the boats and the objects in it. ###Assistant: ",
    "Give me boats and people",
    "###Human: What is this? Please tell me all about it. ###Assistant: ",
]
IMAGES, TOKENS = 3, 6
WITH_IMAGE = "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "


@pytest.fixture(scope="module")
def batch(model):
    """Left-padded embeddings of TEXTS and their mask."""
    return model.prompt_embeds(TEXTS, [[] for _ in TEXTS])


def row(batch, index):
    """One prompt alone, without padding."""
    embeds_BTD, mask_BT = batch
    return embeds_BTD[index][mask_BT[index].bool()][None], mask_BT[index][mask_BT[index].bool()][None]


def answer(ids):
    """Ids of one output row after bos, without end token and filling."""
    ids = ids[1:]
    return ids[: ids.index(EOS)] if EOS in ids else ids


def ends_first(llm, embeds_1TD):
    """A copy of the LLM whose answer to this prompt ends at once."""
    copied = copy.deepcopy(llm)
    hidden = llm.model(inputs_embeds=embeds_1TD).last_hidden_state[0, -1].detach()
    copied.lm_head.weight.data[EOS] = hidden * ((llm.lm_head.weight @ hidden).max().detach() + 1) / (hidden @ hidden)
    return copied


@torch.no_grad()
def plain_greedy(llm, embeds_1TD, decoding):
    """Without cache; bos is the first id that the penalty and the length know."""
    ids = [BOS]
    while len(ids) <= decoding.max_new_tokens and (len(ids) == 1 or ids[-1] != EOS):
        own = llm.get_input_embeddings()(torch.tensor([ids[1:]], dtype=torch.long))
        logits = llm(inputs_embeds=torch.cat([embeds_1TD, own], dim=1), use_cache=False).logits[0, -1]
        for token in set(ids):
            logits[token] *= decoding.repetition_penalty ** (1 if logits[token] < 0 else -1)
        if len(ids) < decoding.min_length:
            logits[EOS] = float("-inf")
        ids.append(logits.argmax().item())
    return ids


@pytest.mark.parametrize(("repetition_penalty", "min_length"), [(1.0, 1), (1.05, 8), (1.3, 1)])
def test_greedy_equals_plain_greedy(llm, tokenizer, batch, repetition_penalty, min_length):
    decoding = Decoding(max_new_tokens=ROOM + 8, repetition_penalty=repetition_penalty, min_length=min_length)
    rows = generate_ids(llm, tokenizer, *batch, decoding).tolist()
    for index, ids in enumerate(rows):
        assert answer(ids) == answer(plain_greedy(llm, row(batch, index)[0], decoding))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_strings_end_rows_one_by_one(model, num_beams):
    kwargs = {"num_beams": num_beams, "max_new_tokens": 16, "stop": ["a", "in", "T", "? rain"]}
    together = model.generate(None, TEXTS, **kwargs)
    assert together == [model.generate(None, [text], **kwargs)[0] for text in TEXTS]
    assert together != model.generate(None, TEXTS, num_beams=num_beams, max_new_tokens=16)
    assert not any(stop in text for text in together for stop in kwargs["stop"])


@pytest.mark.parametrize("text", ["###", "word###", "a# ###", "##\n###"])
def test_stop_string_is_found_however_its_tokens_split_it_and_not_in_bos(tokenizer, text):
    ids = torch.tensor([[BOS, *tokenizer.encode(text, add_special_tokens=False)]])
    criterion = StopOnText(["###", "<s>"], tokenizer)
    assert criterion(ids, None).tolist() == [True]
    assert criterion(ids[:, :-1], None).tolist() == [False]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_row_that_ends_at_once_is_filled_while_others_go_on(llm, tokenizer, batch, num_beams):
    copied = ends_first(llm, row(batch, 2)[0])
    decoding = Decoding(num_beams, max_new_tokens=8, length_penalty=-1.0)
    ids = generate_ids(copied, tokenizer, *batch, decoding).tolist()
    assert ids[2] == [BOS, EOS] + [PAD] * (len(ids[2]) - 2)
    assert answer(ids[0]) == answer(generate_ids(copied, tokenizer, *row(batch, 0), decoding).tolist()[0]) != []


@pytest.mark.parametrize("num_beams", [1, 3])
def test_any_end_token_of_a_list_ends_a_row(llm, tokenizer, batch, num_beams):
    free = generate_ids(llm, tokenizer, *row(batch, 1), Decoding(num_beams, max_new_tokens=8)).tolist()[0]
    copied = copy.deepcopy(llm)
    copied.generation_config.eos_token_id = [EOS, free[3]]
    decoding = Decoding(num_beams, max_new_tokens=8, length_penalty=-9.0)
    ids = generate_ids(copied, tokenizer, *batch, decoding).tolist()
    ends = [[i for i, token in enumerate(r) if i and token in (EOS, free[3])] for r in ids]
    assert ends[1]
    assert all(len(at) <= 1 and set(r[at[0] + 1 :] if at else []) <= {PAD} for at, r in zip(ends, ids, strict=True))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_tokenizer_without_bos(llm, tokenizer, batch, num_beams):
    copied = copy.deepcopy(llm)
    copied.generation_config.bos_token_id = None
    both = [generate_ids(m, tokenizer, *batch, Decoding(num_beams, max_new_tokens=8)) for m in (llm, copied)]
    assert both[1][:, 0].tolist() == [PAD] * len(TEXTS)
    assert torch.equal(both[0][:, 1:], both[1][:, 1:])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_sampling_repeats_with_its_seed_within_the_likeliest_tokens(llm, tokenizer, batch, num_beams):
    decoding = Decoding(num_beams, max_new_tokens=1, temperature=50.0, top_p=1.0, do_sample=True)
    logits = llm(inputs_embeds=batch[0], attention_mask=batch[1]).logits[:, -1]
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        drawn.append(generate_ids(llm, tokenizer, *batch, decoding)[:, 1])
        assert (logits.topk(TOP_K).indices == drawn[-1][:, None]).any(dim=1).all()
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(ids.tolist()) for ids in drawn}) > 2


def test_logits_that_are_not_finite_are_an_error(llm, tokenizer, batch):
    broken = copy.deepcopy(llm)
    broken.lm_head.weight.data.fill_(float("nan"))
    for num_beams in (1, 3):
        with pytest.raises(MiniGPT4Error, match="not finite"):
            generate_ids(broken, tokenizer, *batch, Decoding(num_beams))


def test_narrow_top_p_samples_the_likeliest_token(llm, tokenizer, batch):
    sampled = generate_ids(llm, tokenizer, *batch, Decoding(max_new_tokens=8, top_p=1e-6, do_sample=True))
    assert torch.equal(sampled, generate_ids(llm, tokenizer, *batch, Decoding(max_new_tokens=8)))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"temperature": 0, "do_sample": True}, "temperature: .*do_sample"),
        ({"num_beams": 0}, "num_beams: 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0"),
        ({"stop": ["###", ""]}, "stop: an empty string"),
    ],
)
def test_impossible_settings_are_refused_by_name(model, values, text):
    with pytest.raises(ConfigError, match=text):
        model.generate(None, TEXTS, **values)


# What an answer costs: rows and positions that the parts read


@contextmanager
def calls_of(module):
    """Rows, positions and whether a gradient is kept, of each call of a module."""
    calls = []

    def note(_, args, kwargs, output):
        read = next(given for given in (*args, *kwargs.values()) if given is not None)
        calls.append((*read.shape[:2], getattr(output, "logits", output).requires_grad))

    hook = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("beams", [1, 4])
def test_images_and_prompts_are_read_once_and_each_token_once_a_beam_without_gradients(model, pool, beams):
    length = model.prompt_embeds([WITH_IMAGE], [[model.encode_img(pool[:1])[0]]])[1].numel()
    llm, tower = model.llama_model, model.visual_encoder
    with calls_of(tower) as seen, calls_of(llm) as read, calls_of(llm.lm_head) as scored:
        model.generate(pool[:IMAGES], [WITH_IMAGE] * IMAGES, num_beams=beams, max_new_tokens=TOKENS)
    tokens = [(beams * IMAGES, 1, False)] * (TOKENS - 1)
    assert seen == [(IMAGES, 3, False)]
    assert read == [(IMAGES, length, False), *tokens]
    assert scored == [(IMAGES, 1, False), *tokens]


def test_a_row_that_ended_is_not_read_any_more(llm, tokenizer, batch):
    decoder, limits = BatchDecoder(llm, tokenizer), (2, 6, 4, 1)
    rows = [GenerationState(Decoding(max_new_tokens=limit)) for limit in limits]
    with calls_of(llm) as read:
        decoder.add(rows, *batch)
        while decoder.rows:
            decoder.step()
    assert [count for count, *_ in read] == [4, 3, 2, 2, 1, 1]
    assert [len(row.ids) - 1 for row in rows] == list(limits)
