"""The evaluation loader: every sample once, for any number of ranks and workers."""

import pytest

from minigpt4.common.errors import SampleError
from minigpt4.datasets import BadSampleMonitor


def _dataset(kind, files):
    return files.records(13, missing=[4]) if kind == "records" else files.shards([5, 1, 6])


@pytest.mark.parametrize("kind", ["records", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_together_see_every_sample_once(kind, workers, world_size, files, loaders, tools):
    dataset = _dataset(kind, files)
    alone = tools.ids(loaders.evaluate(dataset))
    assert len(alone) == len(set(alone)) == 12
    split = [
        identity
        for rank in range(world_size)
        for identity in tools.ids(
            loaders.evaluate(dataset, num_workers=workers, rank=rank, world_size=world_size, batch_size=2)
        )
    ]
    assert sorted(split) == sorted(alone)


def test_each_pass_is_the_same_and_the_last_batch_holds_the_rest(files, loaders, tools):
    loader = loaders.evaluate(files.records(7), batch_size=3)
    first, second = list(loader), list(loader)
    assert [len(batch["image_id"]) for batch in first] == [3, 3, 1]
    assert all(map(tools.same, first, second))
    assert tools.ids(first) == [str(key) for key in range(7)]


def test_rank_without_samples_gets_no_batches(files, loaders):
    assert list(loaders.evaluate(files.records(2), rank=2, world_size=3)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_also_after_the_last_good_one(workers, files, loaders, tools):
    monitor = tools.lenient_monitor()
    read = tools.ids(loaders.evaluate(files.records(9, missing=[0, 7, 8]), num_workers=workers, ledger=monitor))
    assert sorted(read) == ["1", "2", "3", "4", "5", "6"]
    assert monitor.state_dict() == {"cats/train": [6, 3]}


def test_limits_stop_an_evaluation(files, loaders):
    monitor = BadSampleMonitor(None, max_share=1.0, max_in_a_row=3)
    with pytest.raises(SampleError, match="3 in a row"):
        list(loaders.evaluate(files.records(9, missing=[4, 5, 6]), ledger=monitor))


def test_mistake_in_code_is_loud_in_workers_too(files, loaders):
    dataset = files.records(3)
    dataset.reader.processor = len
    with pytest.raises(RuntimeError, match="has no len"):
        list(loaders.evaluate(dataset, num_workers=1))
