"""The loaders: what ranks and workers read, in an order that its keys alone decide, and what they must leave alone."""

import multiprocessing
import os
import pickle
import random
import signal
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets import BadSampleMonitor, TrainLoader, TrainSource, to_device
from minigpt4.datasets.datasets.base_dataset import (
    Cursor,
    ReaderSlot,
    Shuffle,
    draw,
    generator,
    iter_infinite,
    iter_once,
    shuffled,
)
from minigpt4.models.prompting import read_samples

# Orders


def test_orders_depend_on_every_key_and_on_nothing_else():
    before = (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    keys = [Shuffle(1, "a"), Shuffle(2, "a"), Shuffle(1, "b"), Shuffle(1, "a", reshuffle_round=1)]
    orders = [tuple(shuffle.order(50, epoch)) for shuffle in keys for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == len(orders)
    assert tuple(Shuffle(1, "a").order(50, 0)) == orders[0]
    first = list(shuffled(range(100), generator(3), size=10))
    assert first == list(shuffled(range(100), generator(3), size=10)) != sorted(first) == list(range(100))
    counts = np.bincount([draw([115, 14, 1], 42, iteration) for iteration in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, np.array([115, 14, 1]) / 130, atol=0.02)
    assert before == (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())


def test_order_stays_as_it_is():
    """Runs that are under way go on in their own order."""
    assert Shuffle(42, "cc_sbu_align/train").order(8, 1).tolist() == [7, 2, 5, 0, 1, 6, 3, 4]
    assert [draw([1, 1], 42, iteration) for iteration in range(8)] == [0, 1, 1, 1, 0, 0, 0, 1]


# Readers


def _dataset(kind, files):
    """A dataset as it arrives in another process."""
    dataset = files.records(16) if kind == "records" else files.shards([5, 1, 7, 3])
    return pickle.loads(pickle.dumps(dataset))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("kind", ["records", "shards"])
def test_all_readers_together_read_every_sample_once_an_epoch(kind, count, files):
    dataset = _dataset(kind, files)
    shards, epochs, once = dataset.num_shards(count), ([], []), []
    for slot in (ReaderSlot(index, count) for index in range(count)):
        once += [sample.key for _, sample in iter_once(dataset, slot)]
        for cursor, sample in iter_infinite(dataset, slot, Shuffle(5, dataset.label), Cursor()):
            epoch = (slot.index + slot.count * cursor.shard) // shards
            if epoch > 1:
                break
            epochs[epoch].append(sample.key)
    assert len(epochs[0]) == len(set(epochs[0])) == 16
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(once)
    assert epochs[0] != epochs[1]


def test_readers_get_equal_shares_of_uneven_shards_over_time(files):
    dataset, reads = files.shards([1, 1, 1]), Counter()
    for index in range(2):
        samples = iter_infinite(dataset, ReaderSlot(index, 2), Shuffle(5, dataset.label), Cursor())
        reads.update(sample.key for _, sample in islice(samples, 30))
    assert set(reads.values()) == {20}


# Training


def _all_ranks(loaders, dataset, batches, world_size, **keys):
    """What each rank reads in its first `batches` batches."""
    for rank in range(world_size):
        loader = loaders.train(dataset, rank=rank, world_size=world_size, **keys)
        yield [next(loader) for _ in range(batches)]
        loader.close()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 3), (2, 2), (3, 0)])
@pytest.mark.parametrize("shards", [None, 1, 6])
def test_every_sample_is_read_once_a_pass_by_all_ranks_and_workers(world_size, workers, shards, files, loaders, tools):
    dataset = files.records(18) if shards is None else files.shards([18 // shards] * shards)
    own = _all_ranks(loaders, dataset, 18 // world_size, world_size, batch_size=1, num_workers=workers)
    read = Counter(identity for batches in own for identity in tools.ids(batches))
    slots = world_size * max(workers, 1)
    assert sum(read.values()) == 18
    if dataset.num_shards(slots) % slots == 0 and 18 % slots == 0:  # else slots end the pass at different batches
        assert set(read.values()) == {1}


def test_samples_of_a_step_do_not_depend_on_how_ranks_and_batches_cut_it(files, loaders, tools):
    dataset = files.records(10)
    cuts = []
    for world_size, batch_size in ((1, 4), (2, 2), (4, 1)):
        own = list(_all_ranks(loaders, dataset, 9, world_size, batch_size=batch_size))
        cuts.append([sorted(tools.ids(batches[step] for batches in own)) for step in range(9)])
    assert cuts[0] == cuts[1] == cuts[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_are_equal_bit_for_bit_and_leave_global_generators_alone(workers, files, loaders, tools):
    sources = (files.records(11), files.shards([4, 6, 2]))
    before = (random.getstate(), torch.get_rng_state().tolist())
    runs = [tools.take(loaders.train(*sources, num_workers=workers, seed=seed), 16) for seed in (1, 1, 2)]
    assert all(map(tools.same, runs[0], runs[1]))
    assert tools.ids(runs[0]) != tools.ids(runs[2])
    assert before == (random.getstate(), torch.get_rng_state().tolist())
    batch = to_device(next(batch for batch in runs[0] if batch["source"] == "cats"), torch.device("cpu"))
    assert (batch["image"].shape, batch["image"].dtype) == ((3, 3, tools.size, tools.size), torch.float32)
    assert batch["answer"] == [f"Cat {identity}." for identity in batch["image_id"]]
    assert read_samples(batch).image_ids == batch["image_id"]


def test_all_ranks_draw_the_same_source_and_ratios_count(files, loaders, tools):
    sources = [TrainSource(files.records(5), 2, ratio=3.0), TrainSource(files.shards([5]), 1, ratio=1.0)]
    own = [tools.take(loaders.train(*sources, rank=rank, world_size=2), 200) for rank in range(2)]
    drawn = [[batch["source"] for batch in batches] for batches in own]
    assert drawn[0] == drawn[1]
    assert 130 < drawn[0].count("cats") < 170
    assert {len(batch["image_id"]) for batch in own[0] if batch["source"] == "cats"} == {2}


@pytest.mark.parametrize("workers", [0, 2])
def test_mistake_in_code_is_loud(workers, files, loaders):
    dataset = files.records(5)
    dataset.reader.processor = len
    error, text = (TypeError, "has no len") if workers == 0 else (RuntimeError, "(?s)Traceback.*TypeError.*has no len")
    with pytest.raises(error, match=text):
        next(loaders.train(dataset, num_workers=workers))
    with pytest.raises(error, match=text):
        list(loaders.evaluate(dataset, num_workers=workers))


def test_workers_outlive_the_signals_that_tell_a_run_to_save_and_none_starves(files, loaders, tools):
    loader = loaders.train(files.shards([1]), batch_size=2, num_workers=3)
    next(loader)
    for process in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(process.pid, number)
    assert set(tools.ids(tools.take(loader, 20))) == {"000000000"}


def test_nothing_to_train_on_is_refused(tools):
    with pytest.raises(ConfigError, match="nothing to train on"):
        TrainLoader([], num_workers=0, seed=1, ledger=tools.lenient_monitor())


# Evaluation


@pytest.mark.parametrize("kind", ["records", "shards"])
@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 2)])
def test_all_ranks_together_evaluate_every_sample_once(kind, workers, world_size, files, loaders, tools):
    dataset = files.records(13, missing=[4]) if kind == "records" else files.shards([5, 1, 6])
    alone = tools.ids(loaders.evaluate(dataset))
    assert len(alone) == len(set(alone)) == 12
    keys = {"num_workers": workers, "world_size": world_size, "batch_size": 2}
    split = [i for rank in range(world_size) for i in tools.ids(loaders.evaluate(dataset, rank=rank, **keys))]
    assert sorted(split) == sorted(alone)


def test_each_pass_is_the_same_and_the_last_batch_holds_the_rest(files, loaders, tools):
    loader = loaders.evaluate(files.records(7), batch_size=3)
    first, second = list(loader), list(loader)
    assert [len(batch["image_id"]) for batch in first] == [3, 3, 1]
    assert all(map(tools.same, first, second))
    assert tools.ids(first) == [str(key) for key in range(7)]
    assert list(loaders.evaluate(files.records(2), rank=2, world_size=3)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_also_after_the_last_good_one_and_limited(workers, files, loaders, tools):
    dataset, monitor = files.records(9, missing=[0, 7, 8]), tools.lenient_monitor()
    assert sorted(tools.ids(loaders.evaluate(dataset, num_workers=workers, ledger=monitor))) == list("123456")
    assert monitor.state_dict() == {"cats/train": [6, 3]}
    strict = BadSampleMonitor(None, max_share=1.0, max_in_a_row=1)
    with pytest.raises(SampleError, match="1 in a row"):
        list(loaders.evaluate(dataset, num_workers=workers, ledger=strict))
