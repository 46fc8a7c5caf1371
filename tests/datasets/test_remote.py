"""Data at addresses: the batches of the local files, whatever the network does, or an error that names the address."""

import json
import multiprocessing
from itertools import repeat

import fsspec
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from minigpt4.common.errors import ConfigError, RunError, SampleError
from minigpt4.common.remote import RemoteFile, is_remote, open_remote
from minigpt4.datasets import TrainSource

COUNT = 9


@pytest.fixture
def kinds(files):
    """By kind of data: `kinds[kind](base)`, its dataset with all files below `base`, a folder or an address."""
    images = files.images(range(COUNT))
    captions = [f"Cat {key}." for key in range(COUNT)]
    files.json("cats.json", [{"image_id": str(key), "caption": text} for key, text in enumerate(captions)])
    contents = [{"bytes": (images / f"{key}.jpg").read_bytes(), "path": None} for key in range(COUNT)]
    table = pa.table({"image_id": [str(key) for key in range(COUNT)], "caption": captions, "image": contents})
    parquet.write_table(table, files.folder / "cats.parquet", row_group_size=4)
    for number in range(3):
        files.shard(f"cats-{number}.tar", range(4 * number, 4 * number + 4))
    cut = files.folder / "cats-2.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    return {
        "tar": lambda base, **more: files.dataset(
            "image_caption_shards", "cats", storage=f"{base}/cats-{{0..2}}.tar", **more
        ),
        "json": lambda base, **more: files.dataset(
            "image_caption_json", "cats", ann_path=f"{base}/cats.json", image_path=f"{base}/images", **more
        ),
        "parquet": lambda base, **more: files.dataset(
            "image_caption_json", "cats", ann_path=f"{base}/cats.parquet", **more
        ),
    }


def batches(dataset, loaders, tools, workers=0, count=7):
    loader = loaders.train(TrainSource(dataset, 2), num_workers=workers)
    return tools.take(loader, count), loader.state_dict()


@pytest.mark.parametrize(
    ("kind", "workers", "more"),
    [
        *(("tar", workers, {}) for workers in (0, 2)),
        *((kind, 2, {}) for kind in ("json", "parquet")),
        ("tar", 0, {"ranges": False}),
        ("json", 0, {"ranges": False}),
    ],
)
def test_failing_server_gives_the_batches_of_the_folder_and_a_resumed_run_too(
    kind, workers, more, kinds, files, flaky, loaders, tools, monkeypatch
):
    monkeypatch.setattr("minigpt4.common.remote.BLOCK", 1500)  # several requests a file
    wanted, state = batches(kinds[kind](files.folder), loaders, tools, workers, 12)
    server = flaky(files.folder, **more)
    dataset = kinds[kind](server.url)
    first, middle = batches(dataset, loaders, tools, workers, 5)
    assert all(map(tools.same, first, wanted))
    resumed = loaders.train(TrainSource(dataset, 2), num_workers=workers)
    resumed.load_state_dict(json.loads(json.dumps(middle)))
    assert all(map(tools.same, tools.take(resumed, 7), wanted[5:]))
    assert resumed.state_dict() == state
    assert {fault for _, _, fault in server.asked} >= {"503", "drop", "cut", "500", "slow"}


@pytest.mark.parametrize("kind", ["tar", "json", "parquet"])
def test_copies_are_fetched_once_and_again_when_the_size_changes(kind, kinds, files, flaky, loaders, tools, tmp_path):
    wanted, _ = batches(kinds[kind](files.folder), loaders, tools)
    server, cache = flaky(files.folder), tmp_path / "cache"
    for number in range(2):
        read, _ = batches(kinds[kind](server.url, cache_dir=str(cache)), loaders, tools)
        assert all(map(tools.same, read, wanted))
        if number == 0:
            copies, server.asked[:], server.faults = sorted(cache.iterdir()), [], repeat(None)
    assert sorted(cache.iterdir()) == copies
    assert {method for method, _, _ in server.asked} == {"HEAD"}
    files.json("cats.json", [{"image_id": "1", "caption": "One cat."}])
    changed = open_remote(f"{server.url}/cats.json", cache).read()
    assert changed == (files.folder / "cats.json").read_bytes()


@pytest.mark.parametrize("kind", ["tar", "json", "parquet", "pattern"])
def test_other_file_systems_are_read_as_the_folder_is(kind, kinds, files, loaders, tools):
    memory = fsspec.filesystem("memory")
    memory.put(str(files.folder), "/bucket", recursive=True)
    try:
        wanted, _ = batches(kinds["parquet" if kind == "pattern" else kind](files.folder), loaders, tools)
        if kind == "pattern":
            dataset = files.dataset("image_caption_json", "cats", ann_path="memory://bucket/c*.parquet")
        else:
            dataset = kinds[kind]("memory://bucket")
        read, _ = batches(dataset, loaders, tools)
        assert all(map(tools.same, read, wanted))
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize(("fault", "workers"), [("503", 2), ("503", 0), ("drop", 0), ("429", 0), ("cut", 0)])
def test_server_that_never_answers_ends_the_run_with_its_address(fault, workers, kinds, files, flaky, loaders):
    server = flaky(files.folder, [fault])
    loader = loaders.train(TrainSource(kinds["tar"](server.url), 2), num_workers=workers)
    with pytest.raises(RunError, match=rf"{server.url}/cats-\d.tar: cannot be read, try 8 of 8 failed"):
        next(loader)
    assert not multiprocessing.active_children()
    with pytest.raises(RunError, match=rf"{server.url}/cats.json: cannot be read, try \d of \d failed"):
        kinds["json"](server.url)


def test_what_is_not_there_is_one_bad_sample_or_a_wrong_section(kinds, files, flaky, tools):
    server = flaky(files.folder, [None])
    (files.folder / "cats-1.tar").unlink()
    (files.folder / "images/3.jpg").unlink()
    for kind in ("tar", "json"):
        _, reasons = tools.read(kinds[kind](server.url))
        assert any(("cats-1.tar" if kind == "tar" else "images/3.jpg") in reason for reason in reasons)
    assert not any(fault for _, _, fault in server.asked)
    asked = len(server.asked)
    (files.folder / "cats.json").unlink()
    with pytest.raises(ConfigError, match=f"{server.url}/cats.json: cannot be read"):
        kinds["json"](server.url)
    assert len(server.asked) - asked <= 2, "it is not asked for again"


def test_records_may_hold_addresses_of_their_own(files, flaky, tools, caplog):
    images, server = files.images("ab"), flaky(files.folder)
    names = ["a.jpg", *(f"{server.url}/images/{name}.jpg" for name in ("a", "gone"))]
    names += ["http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/b.jpg"]
    file = files.json("cats.json", [{"image": name, "caption": "A cat."} for name in names])
    dataset = files.dataset("image_caption_json", ann_path=str(file), image_path=str(images))
    lazy = [next(dataset.open(number, 1, None)) for number in range(5)]
    local, remote = (one.load()["image"] for one in lazy[:2])
    assert torch.equal(tools.seen(local), tools.seen(remote))
    caplog.clear()
    for number in (2, 3):
        with pytest.raises(SampleError, match=f"record {number + 1}: .*{names[number]}"):
            lazy[number].load()
    with pytest.raises(SampleError, match=f"record 5: .*{names[4]}"):
        lazy[4].load()
    assert sum("try 8 of 8" in said.message for said in caplog.records) == 1  # the host is tried once an image now


def test_reads_anywhere_in_a_file_and_an_unknown_kind_of_address(files, flaky):
    content = bytes(range(256)) * 40
    (files.folder / "x.bin").write_bytes(content)
    file = RemoteFile(f"{flaky(files.folder).url}/x.bin")
    for offset, whence, size in ((100, 0, 300), (-500, 2, 1000), (0, 0, len(content)), (20000, 0, 5)):
        at = file.seek(offset, whence)
        assert file.read(size) == content[at : at + size]
    assert [is_remote(one) for one in ("s3://a/b", "file:///a", "/a/b", "pipe:cat http://a", "a::b://c")] == [
        *(True, False, False, False, False)
    ]
    with pytest.raises(ConfigError, match="nonsense://a"):
        RemoteFile("nonsense://a/b")
