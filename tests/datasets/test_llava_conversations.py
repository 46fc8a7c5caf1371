"""LLaVA's files of conversations: what is read, what is refused, the batch, and the order by modality and length."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets import DevicePrefetcher, TrainSource, first_sample, to_device
from minigpt4.datasets.datasets.base_dataset import GroupedShuffle, Shuffle, modality_length_order
from minigpt4.datasets.feature_store import CachedBatch, FeatureStore, RowShape
from minigpt4.processors import Uint8Image

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "parity_llava/sampler.json").read_text())


def turns(*texts, first="human"):
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": speakers[index % 2], "value": text} for index, text in enumerate(texts)]


def record(key, *texts, image=None, **more):
    fields = {} if image is None else {"image": image}
    return {"id": key, **fields, "conversations": turns(*texts, **more)}


@pytest.fixture
def talks(files):
    """The dataset of these records; `a.jpg`, `b.jpg` and `c.jpg` exist."""
    images = files.images("abc")

    def talks(records, name="talks", **info):
        file = files.json(f"{name}.json", records)
        info = {"ann_path": str(file), "image_path": str(images), "id_field": "id", **info}
        return files.dataset("llava_conversations", name, **info)

    return talks


def load(dataset, index=0):
    (lazy,) = dataset.open(index, 1, None)
    return lazy.load()


@pytest.fixture
def golden(files):
    def golden(name):
        info = {"ann_path": str(DATA / f"parity_llava/data/{name}.json"), "image_path": str(DATA / "parity/images")}
        return files.dataset("llava_conversations", name, id_field="id", **info)

    return golden


# Records


@pytest.mark.parametrize("name", ["pretrain", "instruct"])
def test_records_of_the_reference_are_all_read_as_they_stand_with_its_lengths(name, golden):
    dataset, records = golden(name), json.loads((DATA / f"parity_llava/data/{name}.json").read_text())
    samples = [load(dataset, index) for index in range(dataset.size)]
    assert [sample["conversations"] for sample in samples] == [record["conversations"] for record in records]
    assert [sample["image_id"] for sample in samples] == [record["id"] for record in records]
    assert [len(sample["image"]) for sample in samples] == ["image" in record for record in records]
    assert dataset.modality_lengths().tolist() == GOLDEN["modality_lengths"][name]


@pytest.mark.parametrize(
    ("entry", "images"),
    [
        (record("1", "What is it?\n<image>", "A cat.", image="a.jpg"), 1),
        (record("2", "<image> <image>\nWhat is it?", "A cat.", image="a.jpg"), 1),
        (record("3", "Hm?", "Yes.", "<image>", "A cat.", image="a.jpg"), 1),
        (record("4", "<image> and <image>?", "Cats.", "Hm?", "No.", image=["a.jpg", "b.jpg"]), 2),
        (record("4a", "<image>?", "A cat.", "And <image>?", "A dog.", image=["a.jpg", "b.jpg"]), 2),
        (record("4b", "<image>\nWhat happens?", "A cat sleeps.", image=["a.jpg", "b.jpg", "c.jpg"]), 3),
        (record("4c", "<image>?", "A.", "<image> or <image>?", "B.", image=["a.jpg", "b.jpg", "c.jpg"]), 3),
        (record("5", "I am here.", "<image>\nWhat is it?", "A cat.", image="a.jpg", first="gpt"), 1),
        (record("6", "What is 1 + 1?", "2"), 0),
        (record("7", "What is 1 + 1?", "2", image=[]), 0),
        ({**record("8", "Hm?", "Yes."), "image": None, "model": "", "video": None}, 0),
    ],
    ids=lambda value: value["id"] if isinstance(value, dict) else "",
)
def test_form_of_a_record_that_is_read(entry, images, talks, tools):
    sample = load(talks([entry]))
    assert sample["conversations"] == entry["conversations"]
    assert [image.shape for image in sample["image"]] == [(3, tools.size, tools.size)] * images


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (record("x"), "no turns; the field 'conversations'"),
        ({"id": "x", "conversation": []}, "no turns"),
        (record("x", "<image>?", "A cat.") | {"conversations": ["?"]}, "turn 1 must be"),
        (record("x", "a", None), "turn 2 must be"),
        ({"id": "x", "conversations": [{"from": "Human", "value": "a"}]}, "turn 1 is from 'Human', neither human nor"),
        ({"id": "x", "conversations": turns("a") * 2}, "turn 2 must be from 'gpt'"),
        (record("x", "a", "b", "c"), "the last question has no answer"),
        (record("x", "a", first="gpt"), "the last question has no answer"),
        (record("x", "a", "b", first="gpt"), "the last question has no answer"),
        (record("x", "a", " \n"), "turn 2 is empty"),
        (record("x", "", "b"), "turn 1 is empty"),
        (record("x", "a", "b \ufffd"), "turn 2 cannot be read"),
        (record("x", "<image> a", "b"), "<image> in the questions: 1, images of the record: 0"),
        (record("x", "a", "b", image="a.jpg"), "questions: 0, images of the record: 1"),
        (record("x", "<image>", "b", "<image>", "d", image="a.jpg"), r"questions: 1 \+ 1, images of the record: 1"),
        (record("x", "<image>" * 3, "b", image=["a.jpg", "b.jpg"]), "questions: 3, images of the record: 2"),
        (record("x", "<image>", "b", "<image>" * 2, "d", image=["a.jpg"] * 2), r"1 \+ 2, images of the record: 2"),
        (record("x", "<image>", "a", "b", first="gpt", image="a.jpg"), "questions: 0, images of the record: 1"),
        (record("x", "a", "<image>", image="a.jpg"), "turn 2 is an answer with <image>"),
        (record("x", "<image>", "b", image=""), "the field 'image' must be a path, or a list"),
        (record("x", "<image>", "b", image=5), "the field 'image' must be a path, or a list"),
        (record("x", "<image>", "b", image="a\0.jpg"), "the field 'image' must be a path, or a list"),
        (record("x", "<image>", "b", image="gone.jpg"), "the image .*gone.jpg does not exist$"),
        (record("x", "<image>", "b", image="coco\\a.jpg"), "does not exist; folders are parted by /"),
        (record("x", "<video>", "b") | {"video": "a.mp4"}, "the field 'video' is not read; build_info.image_field"),
        (record("x", "a", "b") | {"images": ["a.jpg"]}, "the field 'images' is not read"),
        (record("x", "<image><image>", "b", image=["a.jpg", "text.jpg"]), ".*text.jpg: not an image"),
    ],
)
def test_bad_record_is_counted_with_id_place_and_reason(entry, complaint, talks, files, loaders, tools, tmp_path):
    good = record("good", "<image>", "A cat.", image="a.jpg")
    dataset = talks([good, entry])
    (files.folder / "images/text.jpg").write_bytes(b"no image")
    with pytest.raises(SampleError, match=f"talks.json, record 2: .*{complaint}"):
        load(dataset, 1)
    monitor = tools.lenient_monitor(tmp_path)
    assert tools.ids(tools.take(loaders.train(dataset, batch_size=1, ledger=monitor), 3)) == ["good"] * 3
    bad = json.loads((tmp_path / "bad_samples.jsonl").read_text().splitlines()[0])
    assert (bad["key"], bad["source"]) == ("x", "talks/train")
    assert bad["file"].endswith("talks.json, record 2")
    assert len(dataset.modality_lengths()) == 2


def test_turns_may_be_json_text(talks):
    entry = record("1", "<image>", "A cat.", image="a.jpg")
    assert load(talks([entry | {"conversations": json.dumps(entry["conversations"])}]))["conversations"] == turns(
        "<image>", "A cat."
    )
    with pytest.raises(SampleError, match="the field 'conversations' is not JSON"):
        load(talks([entry | {"conversations": "[{"}], "cut"))


def test_line_of_the_first_sample_tells_its_images_and_answers(talks, tools):
    side = f"{tools.size} x {tools.size}"
    entry = record("7", "<image> <image>", "A cat.", "Hm?", "A dog.", image=["a.jpg", "b.jpg"])
    assert first_sample(talks([entry])).endswith(f"image_id 7, image {side}, image {side}, 'A cat. | A dog.'")
    assert first_sample(talks([record("", "Hm?", "Yes.")])).endswith("talks.json, record 1, 'Yes.'")


# Batches


ONE, OTHER = record("1", "<image>", "A.", image="a.jpg"), record("2", "<image>", "B.", image="b.jpg")
NONE, TWO = record("0", "Hm?", "Yes."), record("3", "<image><image>", "C.", image=["b.jpg", "c.jpg"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("records", "lengths"),
    [([ONE, OTHER], [1, 1]), ([NONE, NONE], None), ([ONE, NONE], [1, 0]), ([NONE, TWO, ONE], [0, 2, 1])],
)
def test_batch_holds_conversations_and_the_images_that_there_are(records, lengths, workers, talks, loaders, tools):
    dataset, twice = talks(records), talks([entry for entry in records for _ in range(2)], "twice")
    batch, *_ = loaders.evaluate(twice if workers else dataset, batch_size=len(records), num_workers=workers)
    assert batch["conversations"] == [entry["conversations"] for entry in records]
    assert batch["image_id"] == [entry["id"] for entry in records]
    ready = to_device(batch, torch.device("cpu"))
    if not lengths or not max(lengths):
        assert not {"image", "length"} & ready.keys()
        return
    own = [[image.normalised() for image in load(dataset, index)["image"]] for index in range(len(records))]
    if set(lengths) == {1}:
        assert "length" not in batch
        assert torch.equal(ready["image"], torch.stack([images[0] for images in own]))
        return
    assert batch["length"].tolist() == lengths
    assert ready["image"].shape == (len(records), max(lengths), 3, tools.size, tools.size)
    assert isinstance(batch["image"], Uint8Image)
    for images, wanted in zip(ready["image"], own, strict=True):
        assert all(map(torch.equal, images, wanted))
    assert not batch["image"].pixels[torch.tensor(lengths).eq(0)].any()


def test_batch_of_a_feature_cache_has_its_images_behind_each_other(talks, tmp_path):
    dataset = talks([NONE, TWO, ONE])
    dataset.reader = dataclasses.replace(dataset.reader, features=FeatureStore(tmp_path, RowShape(2, 3, "float16")))
    batch = dataset.collater([load(dataset, index) for index in range(3)])
    assert isinstance(batch["image"], CachedBatch)
    assert batch["image"].features.shape == (6, 2, 3)
    assert (batch["image"].missing, batch["length"].tolist()) == ([2, 3, 4], [0, 2, 1])


# The order by modality and length


@pytest.mark.parametrize("case", GOLDEN["sampler"], ids=map(str, range(len(GOLDEN["sampler"]))))
def test_order_is_the_reference_s(case):
    lengths = np.array(case["lengths"])
    arguments = (lengths if case["group_by_modality"] else abs(lengths), case["batch_size"], case["world_size"])
    if "error" in case:
        with pytest.raises(ValueError, match="length 0"):
            modality_length_order(*arguments)
        return
    before = torch.get_rng_state()
    order = modality_length_order(*arguments, torch.Generator().manual_seed(case["seed"]))
    assert order.tolist() == case["order"]
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def mixed(talks):
    """48 records of every length from 2 to 25 words, 16 of them without image, and none bad."""
    words = [" ".join(["word"] * (2 + number // 2)) for number in range(48)]
    with_image = [record(str(number), "<image>", words[number], image="a.jpg") for number in range(32)]
    return talks([*with_image, *(record(str(number), "Hm?", words[number]) for number in range(32, 48))])


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (2, 2), (3, 2)])
def test_each_rank_gets_its_batch_of_each_step_in_every_epoch(world_size, workers, mixed, loaders, tools):
    source = TrainSource(mixed, 4, group_by_modality_length=True)
    keys = {"num_workers": workers, "world_size": world_size}
    steps = 48 // (4 * world_size)
    own = [tools.take(loaders.train(source, rank=rank, **keys), 2 * steps) for rank in range(world_size)]
    shuffle = GroupedShuffle(Shuffle(7, "talks/train"), mixed.modality_lengths(), 4, world_size)
    wanted = [batch for epoch in range(2) for batch in shuffle.order(48, epoch).tolist()]
    read = [list(map(int, batch["image_id"])) for step in zip(*own, strict=True) for batch in step]
    assert read == wanted
    for epoch in (read[: len(read) // 2], read[len(read) // 2 :]):
        assert sorted(identity for batch in epoch for identity in batch) == list(range(48))
        whole = epoch[: len(epoch) - 2 * world_size]  # the last step may hold what is left of both
        assert all(len({identity < 32 for identity in batch}) == 1 for batch in whole)
    assert read[: len(read) // 2] != read[len(read) // 2 :]


def test_epoch_that_ends_in_mid_step_begins_with_its_first_samples_again():
    shuffle = GroupedShuffle(Shuffle(1, "a"), np.arange(1, 10), 2, 2)
    order = shuffle.order(9, 0)
    assert order.shape == (shuffle.num_units(9), 2) == (6, 2)
    assert order.flatten()[9:].tolist() == order.flatten()[:3].tolist()
    assert sorted(order.flatten()[:9].tolist()) == list(range(9))


@pytest.mark.parametrize(("workers", "positions"), [(0, range(14)), (2, (1, 4, 9, 12))])
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_resumed_run_goes_on_bit_for_bit_in_mid_epoch(device, workers, positions, talks, loaders, tools):
    words = [" ".join(["word"] * (1 + number % 7)) for number in range(21)]
    forms = [{"image": "a.jpg"}, {"image": ["b.jpg", "c.jpg"]}, {}, {"image": "gone.jpg"}]
    places = ["<image>", "<image><image>", "Hm?", "<image>"]
    dataset = talks([record(str(n), places[n % 4], words[n], **forms[n % 4]) for n in range(21)])
    source = TrainSource(dataset, 2, group_by_modality_length=True)
    keys = {"num_workers": workers, "rank": 1, "world_size": 2}

    batches, states = tools.run(DevicePrefetcher(loaders.train(source, **keys), torch.device(device)), 18)
    assert states[-1]["counts"]["talks/train"][1] > 3
    assert {batch["image"].ndim if "image" in batch else None for batch in batches} == {4, 5, None}
    for position in positions:
        resumed = loaders.train(source, **keys)
        resumed.load_state_dict(states[position])
        again, later = tools.run(DevicePrefetcher(resumed, torch.device(device)), 4)
        resumed.close()
        assert later == states[position : position + 5]
        assert all(map(tools.same, again, batches[position:]))


def test_run_that_is_grouped_only_now_or_otherwise_begins_a_new_epoch(mixed, loaders, tools, caplog):
    loader = loaders.train(TrainSource(mixed, 4))
    tools.take(loader, 3)
    for source in (TrainSource(mixed, 4, group_by_modality_length=True), TrainSource(mixed, 4)):
        resumed = loaders.train(source)
        with caplog.at_level(logging.WARNING):
            resumed.load_state_dict(loader.state_dict())
        next(resumed)
        loader = resumed
    assert "units (48 -> 12)" in caplog.text
    assert "units (12 -> 48)" in caplog.text


def test_format_without_lengths_cannot_be_grouped(files, loaders):
    with pytest.raises(ValueError, match="goes with builder: llava_conversations"):
        dataclasses.replace(files.section("image_caption_json", storage="x"), group_by_modality_length=True)
    with pytest.raises(ConfigError, match="datasets.cats.group_by_modality_length: ImageCaptionJson tells no lengths"):
        loaders.train(TrainSource(files.records(3), 1, group_by_modality_length=True))
