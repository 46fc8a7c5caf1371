"""The files of a feature cache: several writers, kills, damage."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minigpt4.datasets import feature_store as store_module
from minigpt4.datasets.feature_store import FeatureStore, RowShape, image_digest

SHAPE = RowShape(tokens=4, width=6, dtype="float16")


def digest(number):
    return image_digest(str(number).encode())


def row(number):
    return np.full((4, 6), number, np.float16)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def filled(folder):
    """A store with the rows 0 to 9."""
    store = FeatureStore(folder, SHAPE)
    for number in range(10):
        store.add(digest(number), row(number))
    store.flush()
    return store


def have(store, numbers):
    return [number for number in numbers if store.get(digest(number)) is not None]


def test_what_was_added_is_read_back_bit_for_bit(filled, folder):
    for store in (filled, FeatureStore(folder, SHAPE)):
        assert all(np.array_equal(store.get(digest(number)), row(number)) for number in range(10))
        assert store.get(digest(10)) is None
        assert len(store) == 10


def test_rows_are_there_for_others_once_they_are_flushed(folder, monkeypatch):
    monkeypatch.setattr(store_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    writer, reader = FeatureStore(folder, SHAPE), FeatureStore(folder, SHAPE)
    writer.add(digest(1), row(1))
    assert reader.get(digest(1)) is None
    writer.flush()
    assert np.array_equal(reader.get(digest(1)), row(1))


def test_several_writers_share_a_folder(folder):
    stores = [FeatureStore(folder, SHAPE) for _ in range(3)]
    for number in range(30):
        stores[number % 3].add(digest(number), row(number))
        stores[number % 3].flush()
    assert have(FeatureStore(folder, SHAPE), range(31)) == list(range(30))


def test_a_copy_in_another_process_reads_and_gets_files_of_its_own(filled, folder):
    copy = pickle.loads(pickle.dumps(filled))
    assert have(copy, range(10)) == list(range(10))
    copy.add(digest(20), row(20))
    copy.flush()
    filled.look_again()
    assert np.array_equal(filled.get(digest(20)), row(20))
    assert len(list(folder.glob("*.rows"))) == 2


@pytest.mark.parametrize("lost", [1, 19, 20, 25])
def test_a_torn_index_loses_its_last_rows_only(filled, folder, lost):
    (index,) = folder.glob("*.index")
    index.write_bytes(index.read_bytes()[:-lost])
    kept = 10 - -(-lost // 20)
    assert have(FeatureStore(folder, SHAPE), range(10)) == list(range(kept))


def test_rows_that_were_cut_off_are_missing_and_can_be_added_again(filled, folder, caplog):
    (rows,) = folder.glob("*.rows")
    rows.write_bytes(rows.read_bytes()[:-1])
    store = FeatureStore(folder, SHAPE)
    assert have(store, range(10)) == list(range(9))
    assert "row 9 is damaged" in caplog.text
    store.add(digest(9), row(9))
    store.flush()
    assert have(store, range(10)) == list(range(10))
    assert have(FeatureStore(folder, SHAPE), range(10)) == list(range(10))


def test_a_flipped_bit_is_noticed(filled, folder):
    (rows,) = folder.glob("*.rows")
    content = bytearray(rows.read_bytes())
    content[SHAPE.nbytes * 3 + 5] ^= 1
    rows.write_bytes(content)
    assert have(FeatureStore(folder, SHAPE), range(10)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_many_rows_are_found_however_they_came(folder):
    store = FeatureStore(folder, SHAPE)
    for number in range(500):
        store.add(digest(number), row(number))
        if number % 7 == 0:
            store.flush()
    store.flush()
    assert have(store, range(501)) == list(range(500))
    assert np.array_equal(store.get(digest(123)), row(123))


def test_a_writer_that_is_killed_leaves_whole_rows(folder):
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import numpy as np
from pathlib import Path
from minigpt4.datasets.feature_store import FeatureStore, RowShape, image_digest
store = FeatureStore(Path({str(folder)!r}), RowShape(4, 6, "float16"))
for number in range(100000):
    store.add(image_digest(str(number).encode()), np.full((4, 6), number % 1000, np.float16))
    store.flush()
    if number == 40:
        print("well under way", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    store = FeatureStore(folder, SHAPE)
    assert len(store) >= 40
    assert have(store, range(len(store))) == list(range(len(store)))


def test_a_row_of_another_shape_is_refused(filled):
    with pytest.raises(ValueError, match="shape"):
        filled.add(digest(1), np.zeros((4, 7), np.float16))
