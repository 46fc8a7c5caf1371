"""The first sample of a dataset, in a line."""

import pytest

from minigpt4.common.errors import SampleError
from minigpt4.datasets import first_sample


def test_line_tells_size_id_image_and_caption(files, tools):
    side = f"{tools.size} x {tools.size}"
    assert first_sample(files.records(3, missing=[0])) == (
        f"cats/train: 3 records; first: image_id 1, image {side}, 'Cat 1.'"
    )
    assert first_sample(files.shards([2, 2])) == (
        f"birds/train: 2 shards, number of samples unknown; first: image_id 000000000, image {side}, 'a photo of 0'"
    )


def test_long_texts_are_shortened_and_conversations_shown(files):
    turns = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}] * 2
    file = files.json("talk.json", [{"image_id": "a", "conversations": turns, "caption": "long " * 50}])
    info = {"ann_path": str(file), "image_path": str(files.images("a"))}
    talk = files.dataset("image_caption_json", conversation_field="conversations", **info)
    assert first_sample(talk).endswith("'Yes. | Yes.'")
    assert first_sample(files.dataset("image_caption_json", **info)).endswith("long long ...'")


def test_dataset_with_nothing_to_read_is_an_error_with_the_first_reason(files):
    with pytest.raises(SampleError, match=r"cats/train: nothing .* none of the first 3 samples .*/0.jpg does not"):
        first_sample(files.records(3, missing=range(3)))
