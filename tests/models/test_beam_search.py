"""The batched search against a plain one: one prompt, no cache, every step computed anew, the rule written out."""

import copy
from math import inf

import pytest
import torch
from torch import nn
from transformers import StoppingCriteria

from minigpt4.models.beam_search import BeamSearch
from minigpt4.models.generation import Decoding, generate_ids

BOS, EOS, PAD = 1, 2, 0


@pytest.fixture(scope="module")
def prompts(llm):
    """Random embeddings of ragged lengths."""
    draw = torch.Generator().manual_seed(0)
    table = llm.get_input_embeddings().weight.detach()
    lengths = torch.randint(3, 20, (12,), generator=draw).tolist()
    rows = [table[torch.randint(3, len(table), (length,), generator=draw)] for length in lengths]
    return [row + 0.3 * table.std() * torch.randn(row.shape, generator=draw) for row in rows]


@pytest.fixture(scope="module")
def short_llm(llm, prompts):
    """The LLM with an end token that is likely everywhere, so that answers end in all sorts of places."""
    mean = torch.stack([last_hidden(llm, prompt) for prompt in prompts]).mean(dim=0)
    model = copy.deepcopy(llm)
    model.lm_head.weight.data[EOS] += 5 * mean / (mean @ mean)
    return model


@torch.no_grad()
def last_hidden(llm, prompt_TD):
    return llm.model(inputs_embeds=prompt_TD[None]).last_hidden_state[0, -1]


def left_pad(prompts):
    flipped = nn.utils.rnn.pad_sequence([p.flip(0) for p in prompts], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.long) for p in prompts], batch_first=True)
    return flipped.flip(1), mask.flip(1)


def answers(llm, tokenizer, prompts, decoding):
    """Rows without the filling after their end."""
    rows = generate_ids(llm, tokenizer, *left_pad(prompts), decoding).tolist()
    return [row[: row.index(EOS, 1) + 1] if EOS in row[1:] else row for row in rows]


def next_log_probs(llm, prompt_TD, beams, decoding):
    """Of each beam; all are as long."""
    own = llm.get_input_embeddings()(torch.tensor([ids[1:] for ids in beams], dtype=torch.long))
    embeds = torch.cat([prompt_TD.expand(len(beams), -1, -1), own], dim=1)
    scores = llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1].log_softmax(dim=-1)
    for row, ids in zip(scores, beams, strict=True):
        row[list(set(ids))] *= decoding.repetition_penalty  # log-probabilities are negative
        if len(ids) < decoding.min_length:
            row[EOS] = -inf
    return scores


@torch.no_grad()
def plain_search(llm, prompt_TD, decoding):
    """The answer with bos, and the number of steps that it took."""
    size, power = decoding.num_beams, decoding.length_penalty
    beams, finished = [(0.0, [BOS])], []

    def finish(total, ids, end):
        finished.append((total / len(ids) ** power, ids + end))
        finished.sort(key=lambda entry: entry[0], reverse=True)
        del finished[size:]

    for generated in range(1, decoding.max_new_tokens + 1):
        candidates = []
        scores = next_log_probs(llm, prompt_TD, [ids for _, ids in beams], decoding)
        for (total, ids), row in zip(beams, scores, strict=True):
            top = (total + row).topk(2 * size)
            candidates += [(value, ids, token) for value, token in zip(*(x.tolist() for x in top), strict=True)]
        candidates = sorted(candidates, key=lambda c: c[0], reverse=True)[: 2 * size]
        for total, ids, token in candidates[:size]:
            if token == EOS:
                finish(total, ids, [EOS])
        beams = [(total, [*ids, token]) for total, ids, token in candidates if token != EOS][:size]
        attainable = candidates[0][0] / (1 + generated) ** power
        if len(finished) == size and finished[-1][0] >= attainable:
            return finished[0][1], generated
    for total, ids in beams:
        finish(total, ids, [])
    return finished[0][1], decoding.max_new_tokens


@pytest.mark.parametrize("name", ["beam4", "beam4_lp2", "beam2_lpneg", "beam4_noqformer"])
def test_plain_search_gives_the_golden_answers(llm, golden, golden_tensors, name):
    case = next(case for case in golden["generate"]["cases"] if case["name"] == name)
    tensors = [golden_tensors[f"generate/{name}/{key}"] for key in ("inputs_embeds", "attention_mask")]
    for embeds, mask, expected in zip(*tensors, case["output_ids"], strict=True):
        ids, _ = plain_search(llm, embeds[mask.bool()], Decoding(**case["kwargs"]))
        assert ids + [PAD] * (len(expected) - len(ids)) == expected


SETTINGS = [
    Decoding(num_beams=5, max_new_tokens=24),
    Decoding(num_beams=2, max_new_tokens=24),
    Decoding(num_beams=4, max_new_tokens=24, length_penalty=2.0, repetition_penalty=1.05),
    Decoding(num_beams=3, max_new_tokens=24, length_penalty=0.5, min_length=8),
    Decoding(num_beams=3, max_new_tokens=24, length_penalty=-1.0, repetition_penalty=1.3, min_length=8),
    Decoding(num_beams=4, max_new_tokens=5, length_penalty=0.0),
    Decoding(num_beams=5, max_new_tokens=1),
]


@pytest.mark.parametrize("decoding", SETTINGS, ids=str)
@pytest.mark.parametrize("ends", ["seldom", "often"])
def test_batched_search_equals_plain_search(llm, short_llm, tokenizer, prompts, decoding, ends):
    model = short_llm if ends == "often" else llm
    expected = [plain_search(model, prompt, decoding)[0] for prompt in prompts]
    assert answers(model, tokenizer, prompts, decoding) == expected


@pytest.mark.parametrize(("length_penalty", "ends"), [(0.0, True), (1.0, False)])
def test_answer_cut_at_the_limit_is_divided_by_its_length_with_bos(llm, tokenizer, prompts, length_penalty, ends):
    """After one token: log p(end) / 1 against log p(token) / 2 ** penalty; here the end is slightly likelier."""
    hidden = last_hidden(llm, prompts[0])
    model = copy.deepcopy(llm)
    model.lm_head.weight.data[EOS] = hidden * ((llm.lm_head.weight @ hidden).max() + 0.1) / (hidden @ hidden)
    decoding = Decoding(num_beams=2, max_new_tokens=1, length_penalty=length_penalty)
    (answer,) = answers(model, tokenizer, prompts[:1], decoding)
    assert (answer == [BOS, EOS]) == ends


def batch_sizes(llm, tokenizer, prompts, decoding):
    sizes = []
    hook = llm.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    generate_ids(llm, tokenizer, *left_pad(prompts), decoding)
    hook.remove()
    return sizes


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_row_is_searched_for_as_many_steps_as_in_plain_search_and_leaves(short_llm, tokenizer, prompts, length_penalty):
    decoding = Decoding(num_beams=2, max_new_tokens=24, length_penalty=length_penalty)
    steps = [plain_search(short_llm, prompt, decoding)[1] for prompt in prompts]
    rows = [sum(own >= step for own in steps) for step in range(1, max(steps) + 1)]
    assert batch_sizes(short_llm, tokenizer, prompts, decoding) == [rows[0], *(2 * count for count in rows[1:])]
    assert min(steps) < decoding.max_new_tokens


class EndsAtOnce(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool)


def test_row_ends_when_no_beam_can_go_on(llm, prompts):
    search = BeamSearch(llm, Decoding(num_beams=3, max_new_tokens=9), [EndsAtOnce()])
    likeliest = (llm.lm_head.weight @ last_hidden(llm, prompts[0])).argmax().item()
    assert search.run(*left_pad(prompts[:1])) == [[BOS, likeliest]]


def test_several_end_tokens_leave_enough_beams(llm, tokenizer, prompts):
    """All the likeliest first tokens end an answer; the search still has beams to go on with."""
    model = copy.deepcopy(llm)
    likeliest = (llm.lm_head.weight @ last_hidden(llm, prompts[0])).topk(8).indices.tolist()
    model.generation_config.eos_token_id = likeliest
    decoding = Decoding(num_beams=2, max_new_tokens=6, length_penalty=9.0)
    (ids,) = generate_ids(model, tokenizer, *left_pad(prompts[:1]), decoding).tolist()
    assert len(ids) == 7
    assert ids[1] not in likeliest


def test_sampling_beams_keeps_two_tokens_at_the_narrowest(llm, tokenizer, prompts):
    decoding = Decoding(num_beams=2, max_new_tokens=1, top_p=1e-6, length_penalty=0.0, do_sample=True)
    for prompt, answer in zip(prompts, answers(llm, tokenizer, prompts, decoding), strict=True):
        assert answer[1] in (llm.lm_head.weight @ last_hidden(llm, prompt)).topk(2).indices
