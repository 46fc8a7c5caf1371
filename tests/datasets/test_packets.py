"""What the slots read: everything once a pass, nothing twice, whatever the number of slots."""

from collections import Counter, defaultdict

import pytest

from minigpt4.datasets.datasets.readers import Cursor, ReaderSlot, Shuffle, iter_infinite, iter_once

SHARD_SIZES = [5, 1, 7, 3]
COUNTS = [1, 2, 3, 4, 6, 9]


def _dataset(kind, files):
    return files.records(16) if kind == "records" else files.shards(SHARD_SIZES)


def _passes(dataset, count, wanted=2):
    """{pass: keys of all slots, in the order of the slots} of the first passes."""
    seen = defaultdict(list)
    for index in range(count):
        slot, units = ReaderSlot(index, count), dataset.units(count)
        for cursor, step in iter_infinite(dataset, slot, Shuffle(5, dataset.label)):
            number = (slot.index + slot.count * cursor.unit) // units
            if number >= wanted:
                break
            seen[number].append(step.key)
    return seen


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["records", "shards"])
def test_all_slots_together_read_every_sample_once_a_pass(kind, count, files):
    dataset = _dataset(kind, files)
    passes = _passes(dataset, count)
    first, second = passes[0], passes[1]
    assert len(first) == len(set(first)) == 16
    assert Counter(first) == Counter(second)
    assert first != second


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["records", "shards"])
def test_evaluation_reads_every_sample_once(kind, count, files):
    dataset = _dataset(kind, files)
    keys = [step.key for index in range(count) for _, step in iter_once(dataset, ReaderSlot(index, count))]
    assert len(keys) == len(set(keys)) == 16


@pytest.mark.parametrize("kind", ["records", "shards"])
def test_slot_goes_on_from_any_cursor(kind, files):
    dataset = _dataset(kind, files)

    def walk(cursor):
        return iter_infinite(dataset, ReaderSlot(1, 2), Shuffle(5, dataset.label), cursor)

    steps = walk(Cursor())
    whole = [next(steps) for _ in range(40)]
    for position in range(30):
        rest = walk(whole[position][0])
        assert [(cursor, step.key) for cursor, step in (next(rest) for _ in range(5))] == [
            (cursor, step.key) for cursor, step in whole[position + 1 : position + 6]
        ]


def test_slots_get_equal_shares_of_uneven_shards_over_time(files):
    dataset = files.shards([1, 1, 1])
    reads = Counter()
    for index in range(2):
        steps = iter_infinite(dataset, ReaderSlot(index, 2), Shuffle(5, dataset.label))
        reads.update(next(steps)[1].key for _ in range(30))
    assert set(reads.values()) == {20}
