"""Random state over a restart."""

import io
import random

import numpy as np
import pytest
import torch

from minigpt4.common.dist_utils import rng_state, seed_everything, set_rng_state


def _draw() -> list:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3).tolist()]


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_same_seed_same_numbers_in_all_generators():
    seed_everything(3)
    first = _draw()
    seed_everything(3)
    assert _draw() == first
    seed_everything(4)
    assert not set(_draw()) & set(first)


@pytest.mark.parametrize("draws", [0, 1, 2])
def test_state_read_from_a_file_goes_on_exactly(draws):
    seed_everything(5)
    for _ in range(draws):
        _draw()
    np.random.randn()  # both generators of normal numbers now hold the second of a pair
    random.gauss(0, 1)
    before = rng_state()
    state = _through_a_file(before)
    wanted = [_draw(), _draw()]
    for saved in (state, before):
        seed_everything(6)
        set_rng_state(saved)
        assert [_draw(), _draw()] == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_of_the_gpu_goes_on_exactly():
    seed_everything(8)
    state = _through_a_file(rng_state())
    wanted = torch.rand(3, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), wanted)


def test_state_saved_on_a_gpu_machine_is_taken_up_without_one(monkeypatch):
    state = {**rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = _draw()
    set_rng_state(state)
    assert _draw() == wanted
