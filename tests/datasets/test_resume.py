"""A loader that goes on from a state gives exactly the batches that would have come."""

import json
import logging

import pytest
import torch

from minigpt4.datasets import DevicePrefetcher, TrainSource

BATCHES = 22


def _sources(kind, files):
    """Datasets with bad samples in them, whose passes end several times within the batches read here."""
    records = files.records(11, missing=[3, 4])
    members = [member for key in range(9) for member in files.pair(key)]
    members[5] = (members[5][0], b'{"caption": ""}')
    files.tar("birds-0.tar", members)
    files.shard("birds-1.tar", range(9, 11))
    cut = files.shard("birds-2.tar", range(11, 15))
    cut.write_bytes(cut.read_bytes()[:3000])
    shards = files.dataset("image_caption_shards", storage=f"{files.folder}/birds-{{0..2}}.tar")
    return {
        "records": [TrainSource(records, 3)],
        "shards": [TrainSource(shards, 3)],
        "mixed": [TrainSource(records, 2, ratio=2.0), TrainSource(shards, 3)],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "workers", "positions"),
    [
        *((kind, 0, range(18)) for kind in ("records", "shards", "mixed")),
        ("mixed", 2, (0, 1, 4, 7, 12)),
        ("mixed", 3, (2, 5)),
    ],
)
def test_resumed_loader_goes_on_bit_for_bit(kind, workers, positions, files, loaders, tools):
    sources = _sources(kind, files)
    loader = loaders.train(*sources, num_workers=workers, rank=1, world_size=2)
    batches, states = tools.run(loader, BATCHES)
    assert [bad > 0 for _, bad in states[-1]["counts"].values()] == [True] * len(sources)
    assert len(json.dumps(states[-1])) < 1000
    for position in positions:
        resumed = loaders.train(*sources, num_workers=workers, rank=1, world_size=2)
        resumed.load_state_dict(states[position])
        again, later = tools.run(resumed, 4)
        resumed.close()
        assert all(map(tools.same, again, batches[position : position + 4]))
        assert later == states[position : position + 5]
    loader.load_state_dict(states[3])  # one that is in use
    assert all(map(tools.same, tools.take(loader, 5), batches[3:]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_prefetcher_gives_the_same_batches_and_states_on_every_device(device, workers, files, loaders, tools):
    sources = _sources("mixed", files)
    batches, states = tools.run(loaders.train(*sources, num_workers=workers), 10)
    loader = loaders.train(*sources, num_workers=workers, pin_memory=device == "cuda")
    prefetcher = DevicePrefetcher(loader, torch.device(device))
    ahead, ahead_states = tools.run(prefetcher, 10)
    assert all(batch["image"].device.type == device for batch in ahead)
    ahead = [{**batch, "image": batch["image"].cpu()} for batch in ahead]
    assert all(map(tools.same, ahead, batches))
    assert ahead_states == states
    prefetcher.load_state_dict(states[4])
    assert next(prefetcher)["image_id"] == batches[4]["image_id"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"world_size": 2}, "world_size (1 -> 2)"),
        ({"num_workers": 2}, "num_workers (0 -> 2)"),
        ({"seed": 8}, "seed (7 -> 8)"),
    ],
)
def test_changed_run_warns_and_goes_on_with_a_new_epoch(change, named, files, loaders, tools, caplog):
    dataset = files.records(8)
    loader = loaders.train(dataset, batch_size=2)
    before = tools.ids(tools.take(loader, 3))
    ranks = range(change.get("world_size", 1))
    read = []
    for rank in ranks:
        resumed = loaders.train(dataset, batch_size=2, rank=rank, **change)
        with caplog.at_level(logging.WARNING):
            resumed.load_state_dict(loader.state_dict())
        read += tools.ids(tools.take(resumed, 4 // len(ranks)))
    assert named in caplog.text
    assert sorted(read) == [str(key) for key in range(8)]
    assert read[:6] != before


def test_changed_or_new_data_warns_of_the_source_and_the_others_go_on(files, loaders, tools, caplog):
    cats, birds = files.records(8), files.shards([3, 3])
    loader = loaders.train(TrainSource(cats, 2), TrainSource(birds, 2))
    tools.take(loader, 6)
    dogs = files.records(4, "dogs")
    resumed = loaders.train(TrainSource(files.records(9), 2), TrainSource(birds, 2), TrainSource(dogs, 1))
    resumed.load_state_dict(loader.state_dict())
    assert "cats/train: units (8 -> 9)" in caplog.text
    assert "dogs/train: not in the checkpoint" in caplog.text
    assert "birds" not in caplog.text
    wanted = next(batch for batch in loader if batch["source"] == "birds")
    read = tools.take(resumed, 20)
    assert tools.same(next(batch for batch in read if batch["source"] == "birds"), wanted)
    assert {batch["source"] for batch in read} == {"cats", "birds", "dogs"}
