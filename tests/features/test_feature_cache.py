"""The files of a feature cache: several writers, kills, damage, and what may happen to the folder while runs use it."""

import multiprocessing
import pickle
import resource
import shutil
from itertools import count

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.datasets.feature_store import FeatureStore, RowShape, image_digest
from minigpt4.models.feature_cache import FeatureCache
from minigpt4.processors import Blip2ImageEvalProcessor, ClipImageEvalProcessor

SHAPE = RowShape(tokens=4, width=6, dtype="float16")
TINY = {"embed_dim": 64, "depth": 1, "num_heads": 4}
FORK = multiprocessing.get_context("fork")


def digest(number):
    return image_digest(str(number).encode())


def row(number):
    return np.full((4, 6), number, np.float16)


def fill(store, numbers):
    for number in numbers:
        store.add(digest(number), row(number))


def have(store, numbers):
    return [n for n in numbers if (found := store.get(digest(n))) is not None and np.array_equal(found, row(n))]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def test_several_writers_share_a_folder_and_a_copy_in_another_process_does_too(folder):
    stores = [FeatureStore(folder, SHAPE) for _ in range(3)]
    copy = pickle.loads(pickle.dumps(stores[0]))
    for number in range(30):
        fill(stores[number % 3], [number])
    for store in (*stores, copy, FeatureStore(folder, SHAPE)):
        assert have(store, range(31)) == list(range(30))
    with pytest.raises(ValueError, match="shape"):
        copy.add(digest(1), np.zeros((4, 7), np.float16))


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "empty"])
def test_damage_is_noticed_and_made_good(folder, damage, caplog):
    store = FeatureStore(folder, SHAPE)
    fill(store, range(5))
    file = folder / digest(3)[:2] / digest(3)
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes({"flipped bit": content, "cut off": content[:-1], "empty": b""}[damage])
    assert have(store, range(5)) == [0, 1, 2, 4]
    assert f"{file}: is damaged" in caplog.text
    fill(store, [3])
    assert have(FeatureStore(folder, SHAPE), range(5)) == list(range(5))


def test_what_is_deleted_while_it_is_used_is_kept_again(folder, caplog):
    store, reader = FeatureStore(folder, SHAPE), FeatureStore(folder, SHAPE)
    fill(store, range(5))
    shutil.rmtree(folder)
    assert have(reader, range(5)) == []
    fill(store, range(10))
    assert have(reader, range(10)) == list(range(10))
    shutil.rmtree(folder)
    folder.write_text("a file in its place")
    fill(store, range(10, 20))
    assert have(store, range(20)) == []
    assert caplog.text.count("keeps no more features") == 1


def test_a_writer_that_is_killed_leaves_whole_files(folder):
    writer = FORK.Process(target=fill, args=(FeatureStore(folder, SHAPE), count()))
    writer.start()
    while not have(FeatureStore(folder, SHAPE), [40]):
        assert writer.is_alive()
    writer.kill()
    writer.join()
    assert have(FeatureStore(folder, SHAPE), range(41)) == list(range(41))
    assert all(file.stat().st_size == SHAPE.nbytes + 4 for file in folder.glob("*/*") if not file.name.startswith("."))


def test_a_full_disk_costs_features_and_one_warning(folder, caplog):
    """A file that would grow beyond the limit is an OSError, as on a full disk."""
    store = FeatureStore(folder, SHAPE)
    fill(store, range(20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        fill(store, range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("keeps no more features") == 1
    assert have(FeatureStore(folder, SHAPE), range(100)) == list(range(20))


def open_together(cache, processor, barrier):
    barrier.wait()
    cache.store(processor)


def test_a_fresh_cache_is_opened_by_many_ranks_at_once(folder):
    cache = FeatureCache(folder, MiniGPT4Config(vit_config=TINY))
    for turn in range(6):
        processor, barrier = Blip2ImageEvalProcessor(image_size=14 + turn), FORK.Barrier(8)
        ranks = [FORK.Process(target=open_together, args=(cache, processor, barrier)) for _ in range(8)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * 8
    assert len(list(folder.iterdir())) == 6
    assert {len(list(path.iterdir())) for path in folder.iterdir()} == {1}


def test_a_path_that_cannot_be_a_folder_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError, match=r"run\.feature_cache: .*name another folder"):
            FeatureCache(path, MiniGPT4Config(vit_config=TINY)).store(Blip2ImageEvalProcessor(image_size=224))


def test_other_weights_in_the_directory_of_a_tower_have_features_of_their_own(
    folder, llava_section, llava_dir, tmp_path
):
    tower = shutil.copytree(llava_dir / "clip_tiny", tmp_path / "tower")
    cfg = bind(LlavaConfig, llava_section(vit_model=str(tower)), section="model", source="test")
    processor = ClipImageEvalProcessor(image_size=56)
    before = FeatureCache(folder, cfg).store(processor).folder
    assert FeatureCache(folder, cfg).store(processor).folder == before
    weights = load_file(tower / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tower / "model.safetensors")
    assert FeatureCache(folder, cfg).store(processor).folder != before
