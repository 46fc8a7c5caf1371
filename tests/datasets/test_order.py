"""Orders are functions of their keys."""

import random

import numpy as np
import torch

from minigpt4.datasets.datasets.base_dataset import ReaderSlot, Shuffle, generator, shuffled
from minigpt4.datasets.datasets.dataloader_utils import draw


def test_slots_of_all_ranks_and_workers_are_all_numbers_once():
    slots = [slot for rank in range(3) for slot in ReaderSlot.of_rank(rank, 3, num_workers=2)]
    assert sorted(slot.index for slot in slots) == list(range(6))
    assert {slot.count for slot in slots} == {6}


def test_order_of_an_epoch_is_a_permutation_that_depends_on_every_key():
    keys = [Shuffle(1, "a"), Shuffle(2, "a"), Shuffle(1, "b"), Shuffle(1, "a", reshuffle_round=1)]
    orders = [tuple(shuffle.order(50, epoch)) for shuffle in keys for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == len(orders)
    assert tuple(Shuffle(1, "a").order(50, 0)) == orders[0]


def test_shuffle_buffer_loses_nothing_and_repeats_itself():
    first = list(shuffled(range(100), generator(3), size=10))
    assert sorted(first) == list(range(100))
    assert first != sorted(first)
    assert first == list(shuffled(range(100), generator(3), size=10))


def test_sources_are_drawn_by_their_weights():
    counts = np.bincount([draw([115, 14, 1], 42, iteration) for iteration in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, np.array([115, 14, 1]) / 130, atol=0.02)


def test_nothing_touches_the_global_generators():
    before = (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    Shuffle(1, "a").order(10, 0)
    list(shuffled(range(10), generator(1), 3))
    draw([1, 2], 3, 4)
    assert before == (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
