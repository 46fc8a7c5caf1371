"""What an answer costs: positions that the LLM reads, and floating-point operations."""

from contextlib import contextmanager

import pytest

from minigpt4.models.batch_decoder import BatchDecoder, GenerationState
from minigpt4.models.beam_search import BeamSearch
from minigpt4.models.generation import Decoding, beam_search, end_tokens, first_token, generate_ids

PROMPT = "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "
IMAGES = 3
TOKENS = 6


@pytest.fixture(scope="module")
def model(shared_model):
    return shared_model()


@pytest.fixture(scope="module")
def prompts(model, pool):
    """Embeddings and mask of three prompts of one length, each with its image."""
    embeds = model.encode_img(pool[:IMAGES])[0].split(1)
    return model.prompt_embeds([PROMPT] * IMAGES, [[own] for own in embeds])


@contextmanager
def positions(module):
    """Rows times positions of each call of a module."""
    calls = []

    def note(_, args, kwargs):
        read = next(given for given in (*args, *kwargs.values()) if given is not None)
        calls.append(read.shape[0] * read.shape[1])

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("beams", [1, 4])
def test_the_prompt_is_read_once_an_image_and_each_token_once_a_beam(model, prompts, beams):
    with positions(model.llama_model) as read, positions(model.llama_model.lm_head) as scored:
        generate_ids(model.llama_model, model.llama_tokenizer, *prompts, Decoding(beams, TOKENS))
    assert read == [prompts[1].numel()] + [beams * IMAGES] * (TOKENS - 1)
    assert scored == [IMAGES] + [beams * IMAGES] * (TOKENS - 1)


def test_a_row_that_ended_is_not_read_any_more(model, prompts):
    decoder = BatchDecoder(model.llama_model, model.llama_tokenizer, end_tokens(model.llama_model))
    limits = (2, 6, 4)
    rows = [GenerationState([first_token(model.llama_model)], Decoding(max_new_tokens=limit)) for limit in limits]
    with positions(model.llama_model) as read:
        decoder.add(rows, *prompts)
        while decoder.rows:
            decoder.step()
    assert read[1:] == [3, 2, 2, 1, 1]
    assert [row.num_new_tokens for row in rows] == list(limits)


def test_a_search_that_is_done_is_not_read_any_more(model, prompts):
    """Together the rows read what each reads alone."""
    llm, tokenizer = model.llama_model, model.llama_tokenizer
    decoding = Decoding(num_beams=3, max_new_tokens=12, length_penalty=0.0)
    search = beam_search(llm, tokenizer, decoding)
    free = search.run(llm, *prompts, first_token(llm))
    ends = [free[0][2]]  # the first row can end early
    search = BeamSearch(3, 12, 0.0, ends, search.processors, search.stopping)
    with positions(llm) as together:
        search.run(llm, *prompts, first_token(llm))
    alone = []
    for row in range(IMAGES):
        with positions(llm) as own:
            search.run(llm, *(part[row : row + 1] for part in prompts), first_token(llm))
        alone.append(sum(own))
    assert sum(together) == sum(alone)
    assert min(alone) < max(alone)


@pytest.mark.parametrize("beams", [1, 3])
def test_images_are_encoded_once_in_one_batch(model, pool, beams):
    sizes = []
    hook = model.visual_encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    model.generate(pool[:IMAGES], [PROMPT] * IMAGES, num_beams=beams, max_new_tokens=2)
    hook.remove()
    assert sizes == [IMAGES]
