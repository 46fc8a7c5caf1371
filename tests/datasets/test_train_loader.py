"""The training loader: what the ranks read, in which order, with what they must leave alone."""

import multiprocessing
import os
import random
import signal
from collections import Counter

import pytest
import torch

from minigpt4.common.errors import ConfigError
from minigpt4.datasets import TrainLoader, TrainSource, to_device
from minigpt4.models.prompting import read_samples

RANKS_AND_WORKERS = [(world, workers) for world in (1, 2, 3) for workers in (0, 1, 2, 3)]


def _all_ranks(loaders, dataset, batches, world_size, **keys):
    """What each rank reads in its first `batches` batches."""
    for rank in range(world_size):
        loader = loaders.train(dataset, rank=rank, world_size=world_size, **keys)
        yield [next(loader) for _ in range(batches)]
        loader.close()


def test_batch_is_what_the_model_takes(files, loaders, tools):
    batch = to_device(next(loaders.train(files.records(5), batch_size=3)), torch.device("cpu"))
    assert batch["image"].shape == (3, 3, tools.size, tools.size)
    assert batch["image"].dtype == torch.float32
    assert batch["source"] == "cats"
    assert batch["answer"] == [f"Cat {identity}." for identity in batch["image_id"]]
    assert read_samples(batch).image_ids == batch["image_id"]


@pytest.mark.parametrize(("world_size", "workers"), RANKS_AND_WORKERS)
def test_records_are_read_once_a_pass_by_all_ranks_and_workers(world_size, workers, files, loaders, tools):
    dataset = files.records(18)
    own = _all_ranks(loaders, dataset, 18 // world_size, world_size, batch_size=1, num_workers=workers)
    read = [identity for batches in own for identity in tools.ids(batches)]
    assert sorted(read, key=int) == [str(key) for key in range(18)]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 3), (2, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("shards", [1, 2, 6])
def test_shards_are_read_once_a_pass_by_all_ranks_and_workers(world_size, workers, shards, files, loaders, tools):
    dataset = files.shards([12 // shards] * shards)
    own = _all_ranks(loaders, dataset, 12 // world_size, world_size, batch_size=1, num_workers=workers)
    read = Counter(identity for batches in own for identity in tools.ids(batches))
    assert sum(read.values()) == 12
    slots = world_size * workers
    if dataset.num_shards(slots) % slots == 0:  # else the slots meet the end of the pass at different batches
        assert set(read.values()) == {1}


def test_no_worker_starves_where_workers_outnumber_samples(files, loaders, tools):
    loader = loaders.train(files.shards([1]), batch_size=2, num_workers=3)
    assert set(tools.ids(tools.take(loader, 6))) == {"000000000"}


def test_samples_of_a_step_do_not_depend_on_how_ranks_and_batches_cut_it(files, loaders, tools):
    dataset = files.records(10)
    cuts = []
    for world_size, batch_size in ((1, 4), (2, 2), (4, 1)):
        own = list(_all_ranks(loaders, dataset, 9, world_size, batch_size=batch_size))
        cuts.append([sorted(tools.ids(batches[step] for batches in own)) for step in range(9)])
    assert cuts[0] == cuts[1] == cuts[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_are_equal_bit_for_bit_and_another_seed_is_not(workers, files, loaders, tools):
    sources = (files.records(11), files.shards([4, 6, 2]))
    runs = [tools.take(loaders.train(*sources, num_workers=workers, seed=seed), 16) for seed in (1, 1, 2)]
    assert all(map(tools.same, runs[0], runs[1]))
    assert tools.ids(runs[0]) != tools.ids(runs[2])


def test_each_pass_has_an_order_of_its_own(files, loaders, tools):
    read = tools.ids(tools.take(loaders.train(files.records(12), batch_size=4), 6))
    assert sorted(read[:12]) == sorted(read[12:])
    assert read[:12] != read[12:]


def test_all_ranks_draw_the_same_source_and_ratios_count(files, loaders, tools):
    sources = [TrainSource(files.records(5), 2, ratio=3.0), TrainSource(files.shards([5]), 1, ratio=1.0)]
    own = [tools.take(loaders.train(*sources, rank=rank, world_size=2), 200) for rank in range(2)]
    drawn = [[batch["source"] for batch in batches] for batches in own]
    assert drawn[0] == drawn[1]
    assert 130 < drawn[0].count("cats") < 170
    assert {len(batch["image_id"]) for batch in own[0] if batch["source"] == "cats"} == {2}


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_left_alone(workers, files, loaders, tools):
    dataset = files.shards([6, 6])
    before = (random.getstate(), torch.get_rng_state().tolist())
    tools.take(loaders.train(dataset, num_workers=workers), 5)
    assert before == (random.getstate(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_mistake_in_code_is_loud(workers, files, loaders):
    dataset = files.records(5)
    dataset.reader.processor = len
    error, text = (TypeError, "has no len") if workers == 0 else (RuntimeError, "(?s)Traceback.*TypeError.*has no len")
    with pytest.raises(error, match=text):
        next(loaders.train(dataset, num_workers=workers))


def test_workers_outlive_the_signals_that_tell_a_run_to_save(files, loaders, tools):
    loader = loaders.train(files.records(50), num_workers=2)
    next(loader)
    for process in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(process.pid, number)
    assert len(tools.take(loader, 20)) == 20


def test_nothing_to_train_on_is_refused(tools):
    with pytest.raises(ConfigError, match="nothing to train on"):
        TrainLoader([], num_workers=0, seed=1, ledger=tools.lenient_monitor())
