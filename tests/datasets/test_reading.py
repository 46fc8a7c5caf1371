"""What readers read: everything once an epoch, nothing twice, however many readers there are."""

from collections import Counter, defaultdict

import pytest

from minigpt4.datasets.datasets.base_dataset import Cursor, ReaderSlot, Shuffle, iter_infinite, iter_once

SHARD_SIZES = [5, 1, 7, 3]
COUNTS = [1, 2, 3, 4, 6, 9]


def _dataset(kind, files):
    return files.records(16) if kind == "records" else files.shards(SHARD_SIZES)


def _epochs(dataset, count, wanted=2):
    """{epoch: keys of all readers, in their order} of the first epochs."""
    seen = defaultdict(list)
    for index in range(count):
        slot, shards = ReaderSlot(index, count), dataset.num_shards(count)
        for cursor, sample in iter_infinite(dataset, slot, Shuffle(5, dataset.label)):
            number = (slot.index + slot.count * cursor.shard) // shards
            if number >= wanted:
                break
            seen[number].append(sample.key)
    return seen


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["records", "shards"])
def test_all_readers_together_read_every_sample_once_an_epoch(kind, count, files):
    dataset = _dataset(kind, files)
    epochs = _epochs(dataset, count)
    first, second = epochs[0], epochs[1]
    assert len(first) == len(set(first)) == 16
    assert Counter(first) == Counter(second)
    assert first != second


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["records", "shards"])
def test_evaluation_reads_every_sample_once(kind, count, files):
    dataset = _dataset(kind, files)
    keys = [sample.key for index in range(count) for _, sample in iter_once(dataset, ReaderSlot(index, count))]
    assert len(keys) == len(set(keys)) == 16


@pytest.mark.parametrize("kind", ["records", "shards"])
def test_reader_goes_on_from_any_cursor(kind, files):
    dataset = _dataset(kind, files)

    def read(cursor):
        return iter_infinite(dataset, ReaderSlot(1, 2), Shuffle(5, dataset.label), cursor)

    samples = read(Cursor())
    whole = [next(samples) for _ in range(40)]
    for position in range(30):
        rest = read(whole[position][0])
        assert [(cursor, sample.key) for cursor, sample in (next(rest) for _ in range(5))] == [
            (cursor, sample.key) for cursor, sample in whole[position + 1 : position + 6]
        ]


def test_readers_get_equal_shares_of_uneven_shards_over_time(files):
    dataset = files.shards([1, 1, 1])
    reads = Counter()
    for index in range(2):
        samples = iter_infinite(dataset, ReaderSlot(index, 2), Shuffle(5, dataset.label))
        reads.update(next(samples)[1].key for _ in range(30))
    assert set(reads.values()) == {20}
