"""Rows that come and go say what each says alone."""

import pytest
import torch

from minigpt4.conversation.decoding import Decoding
from minigpt4.models import batch_decoder, beam_search
from minigpt4.models.batch_decoder import ROOM, BatchDecoder, GenerationState
from minigpt4.models.cuda_graph import CudaGraphs
from minigpt4.models.generation import generate_ids

PROMPTS = [
    "###Human: Hi ###Assistant: ",
    "###Human: Describe the picture with all the people, the boats and the objects in it. ###Assistant: ",
    "Give me boats and people",
]
LONG = Decoding(max_new_tokens=12)


@pytest.fixture(params=["growing", "fixed"])
def decoder(request, llm, tokenizer, monkeypatch):
    """Of the two ways to keep keys and values; the fixed one soon, and with little room, so that it comes and goes."""
    monkeypatch.setattr(batch_decoder, "STEADY", 1)
    monkeypatch.setattr(batch_decoder, "GRAPH_ROOM", 8)
    return BatchDecoder(llm, tokenizer, CudaGraphs("test") if request.param == "fixed" else None)


@pytest.fixture
def join(model, decoder):
    """Let a prompt join the decoder; returns its row."""

    def add(prompt, decoding=LONG, stop=(), generator=None):
        row = GenerationState(decoding, stop, generator)
        decoder.add([row], *model.prompt_embeds([prompt], [[]]))
        return row

    return add


@pytest.fixture
def alone(model):
    """Ids that a prompt gets by itself."""

    def decode(prompt, decoding=LONG, stop=()):
        prompts = model.prompt_embeds([prompt], [[]])
        return generate_ids(model.llama_model, model.llama_tokenizer, *prompts, decoding, stop)[0].tolist()

    return decode


def exhaust(decoder):
    while decoder.rows:
        decoder.step()


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_rows_that_join_a_running_batch_say_what_they_say_alone(decoder, join, alone, order):
    rows = {}
    for number in order:
        rows[number] = join(PROMPTS[number])
        for _ in range(3):
            decoder.step()
    exhaust(decoder)
    assert [rows[number].ids for number in range(3)] == [alone(prompt) for prompt in PROMPTS]


def test_a_row_that_leaves_changes_nothing_for_the_others(decoder, join, alone):
    rows = [join(prompt) for prompt in PROMPTS]
    decoder.step()
    decoder.remove([rows[1]])
    exhaust(decoder)
    assert [rows[0].ids, rows[2].ids] == [alone(PROMPTS[0]), alone(PROMPTS[2])]
    assert len(rows[1].ids) == 2
    assert rows[1].ended is None


def test_room_that_no_row_needs_any_more_is_given_back(decoder, join):
    short = join(PROMPTS[0])
    before = decoder._cache.get_seq_length()
    long = join(PROMPTS[1])
    assert decoder._cache.get_seq_length() > before
    decoder.remove([long])
    assert decoder._cache.get_seq_length() == before
    decoder.remove([short])
    assert decoder._cache.get_seq_length() == 0


def test_each_row_has_its_own_limit_and_stop_string(model, decoder, join, alone):
    free = alone(PROMPTS[1])
    stop = model.llama_tokenizer.decode(free[1:5])[-2:]
    cut, stopped = join(PROMPTS[1], Decoding(max_new_tokens=3)), join(PROMPTS[1], LONG, [stop])
    whole = join(PROMPTS[1])
    exhaust(decoder)
    assert (cut.ids, cut.ended) == (free[:4], False)
    assert (stopped.ids, stopped.ended) == (alone(PROMPTS[1], stop=[stop]), True)
    assert whole.ids == free


def test_penalties_count_the_tokens_of_their_own_row(decoder, join, alone):
    penalised = Decoding(max_new_tokens=12, repetition_penalty=0.1)
    first = join(PROMPTS[1], penalised)
    decoder.step()
    second, plain = join(PROMPTS[1], penalised), join(PROMPTS[1])
    exhaust(decoder)
    assert first.ids == second.ids == alone(PROMPTS[1], penalised) != plain.ids


def test_sampling_with_a_seed_of_its_own_does_not_depend_on_the_neighbours(decoder, join):
    hot = Decoding(max_new_tokens=8, do_sample=True, temperature=5.0, top_p=1.0)
    first = join(PROMPTS[0], hot, generator=torch.Generator().manual_seed(7))
    exhaust(decoder)
    others = [join(PROMPTS[1], hot), join(PROMPTS[2])]
    again = join(PROMPTS[0], hot, generator=torch.Generator().manual_seed(7))
    other = join(PROMPTS[0], hot, generator=torch.Generator().manual_seed(8))
    exhaust(decoder)
    assert again.ids == first.ids != other.ids
    assert all(row.ended is not None for row in others)


def test_sampled_rows_draw_in_the_order_in_which_they_joined(decoder, join):
    hot, drawn = Decoding(max_new_tokens=8, do_sample=True), []
    for prompts in (PROMPTS, PROMPTS[1:]):
        rows = [join(prompt, hot) for prompt in prompts]
        decoder.remove(rows[:-2])
        torch.manual_seed(0)
        exhaust(decoder)
        drawn.append([row.ids for row in rows[-2:]])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("decoder", ["growing"], indirect=True)
def test_a_token_copies_nothing_but_itself_while_there_is_room(decoder, join):
    join(PROMPTS[0], Decoding(max_new_tokens=ROOM + 4))
    decoder.step()  # the prompt was read with room for this many
    place = decoder._cache.layers[0].keys.data_ptr()
    for _ in range(ROOM):
        decoder.step()
    assert decoder._cache.layers[0].keys.data_ptr() == place
    decoder.step()
    decoder.step()
    assert decoder._cache.layers[0].keys.data_ptr() != place


@torch.inference_mode()
@pytest.mark.parametrize("decoder", ["fixed"], indirect=True)
def test_a_fixed_batch_gives_the_logits_of_a_growing_one_and_moves_nothing(model, llm, tokenizer, decoder):
    """Two rows end and keep their places, then one more does and the last two are moved; room runs out."""
    limits, sizes, growing = (6, 11, 30, 8, 30), [], BatchDecoder(llm, tokenizer)
    places: dict[object, set[int]] = {}
    rows = [[GenerationState(Decoding(max_new_tokens=limit)) for limit in limits] for _ in range(2)]
    for own, one in zip(rows, (growing, decoder), strict=True):
        one.end_ids = []
        one.add(own, *model.prompt_embeds([*PROMPTS, *PROMPTS[:2]], [[]] * 5))
    while decoder.rows:
        for one in (growing, decoder):
            one._read_newest()
        torch.testing.assert_close(decoder._logits_BV, growing._logits_BV, rtol=0, atol=1e-5)
        sizes.append(decoder._fixed and (decoder._fixed.size, decoder._fixed._room, len(decoder.rows)))
        if decoder._fixed:
            places.setdefault(decoder._fixed, set()).add(decoder._cache.layers[0]._stores[0].data_ptr())
        for one in (growing, decoder):
            one.step()
    assert [row.ids for row in rows[0]] == [row.ids for row in rows[1]]
    assert {size[0] for size in sizes if size} == {5, 2}
    assert len({size[1] for size in sizes if size}) > 2
    assert {(5, 4), (5, 3)} <= {size[::2] for size in sizes if size}
    assert not growing._fixed
    assert len(places) > 2
    assert {len(own) for own in places.values()} == {1}


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_answers_with_graphs_are_those_without(model, monkeypatch, beams, penalty):
    """Prompts of three lengths, whose searches end at different times, with room that runs out."""
    for module in (batch_decoder, beam_search):
        monkeypatch.setattr(module, "STEADY", 1)
    monkeypatch.setattr(batch_decoder, "GRAPH_ROOM", 8)
    made, init = [], batch_decoder.FixedBatch.__init__
    monkeypatch.setattr(batch_decoder.FixedBatch, "__init__", lambda self, *a, **k: made.append(init(self, *a, **k)))
    prompts, decoding = model.prompt_embeds(PROMPTS, [[]] * 3), Decoding(beams, 24, length_penalty=penalty)
    inputs = (model.llama_model, model.llama_tokenizer, *prompts, decoding)
    without = generate_ids(*inputs)
    assert not made
    assert torch.equal(generate_ids(*inputs, graphs=CudaGraphs("test")), without)
    assert made
