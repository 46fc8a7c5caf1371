"""The decoder's cache: what stays is what was put in, and a token copies nothing but itself."""

import pytest
import torch

from minigpt4.models.batch_decoder import ROOM, KVCache

LAYERS = 2


def states(rows, positions, seed):
    """Keys and values of each layer, (rows, 2, positions, 4)."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, rows, 2, positions, 4, generator=generator)) for _ in range(LAYERS)]


def filled(*parts):
    cache = KVCache()
    for part in parts:
        for number, (keys, values) in enumerate(part):
            cache.update(keys, values, number)
    return cache


def content(cache):
    return [torch.stack([layer.keys, layer.values]) for layer in cache.layers]


def expected(*parts):
    """All positions, one part after the other."""
    return [torch.cat([torch.stack(part[number]) for part in parts], dim=3) for number in range(LAYERS)]


def assert_same(cache, wanted):
    assert all(map(torch.equal, content(cache), wanted))


def test_positions_are_appended_beyond_the_room_that_was_set_aside():
    parts = [states(3, 5, seed=0), *(states(3, 1, seed) for seed in range(1, ROOM + 4))]
    cache = filled(*parts)
    assert_same(cache, expected(*parts))
    assert cache.get_seq_length() == 5 + ROOM + 3


def test_a_token_copies_nothing_but_itself_while_there_is_room():
    cache = filled(states(3, 5, seed=0))
    place = cache.layers[0].keys.data_ptr()
    for seed in range(ROOM):
        for number, (keys, values) in enumerate(states(3, 1, seed)):
            cache.update(keys, values, number)
    assert cache.layers[0].keys.data_ptr() == place


@pytest.mark.parametrize(
    ("staying", "order"),
    [([0, 1, 2], [0, 1, 2]), ([1, 2, 4], [4, 1, 2]), ([3, 4], [3, 4]), ([0, 3], [0, 3]), ([4], [4])],
)
def test_rows_that_stay_fill_the_places_of_those_that_leave(staying, order):
    first, later = states(5, 4, seed=0), states(len(staying), 1, seed=1)
    cache = filled(first)
    assert cache.keep(staying) == order
    assert_same(cache, [part[:, order] for part in expected(first)])
    for number, (keys, values) in enumerate(later):
        cache.update(keys, values, number)
    kept = [tuple(part[order] for part in layer) for layer in first]
    assert_same(cache, expected(kept, later))


def test_first_positions_go_and_later_ones_come():
    first, later = states(2, 6, seed=0), states(2, 1, seed=1)
    cache = filled(first)
    for layer in cache.layers:
        layer.drop_first(4)
    for number, (keys, values) in enumerate(later):
        cache.update(keys, values, number)
    assert_same(cache, [part[:, :, :, 4:] for part in expected(first, later)])


@pytest.mark.parametrize("longer", [0, 1])
def test_rows_are_joined_padded_on_the_left(longer):
    lengths = (3, 5) if longer else (5, 3)
    both = [states(rows, length, seed=length) for rows, length in zip((2, 1), lengths, strict=True)]
    cache = filled(both[0]).joined(filled(both[1]), positions=5)
    for number, layer in enumerate(content(cache)):
        for rows, part, length in ((slice(0, 2), both[0], lengths[0]), (slice(2, 3), both[1], lengths[1])):
            assert torch.equal(layer[:, rows, :, 5 - length :], torch.stack(part[number]))
            assert not layer[:, rows, :, : 5 - length].any()
