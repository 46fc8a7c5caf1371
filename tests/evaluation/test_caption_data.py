"""Images of an evaluation in batches that depend on the data alone, with the references of either mode."""

import json

import pytest
from PIL import Image

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets import build_datasets
from minigpt4.evaluation.caption_data import CaptionData

RECORDS = [
    {"image_id": "a", "caption": "one two", "captions": ["one", "two"]},
    {"image_id": "b", "caption": "one two three four", "captions": ["one two", "three four"]},
    {"image_id": "c", "caption": "one", "captions": ["one"]},
    {"image_id": "d", "caption": "four three two one", "captions": ["four three", "two one"]},
]


@pytest.fixture
def read(tmp_path):
    """The data of records in a file of that kind."""

    def read(records, name: str = "test.json") -> CaptionData:
        for image_id in "abcd":
            Image.new("RGB", (8, 8)).save(tmp_path / f"{image_id}.jpg")
        (tmp_path / name).write_text(records if isinstance(records, str) else json.dumps(records))
        info = {"ann_path": f"{tmp_path}/{name}", "test_ann_path": f"{tmp_path}/{name}", "image_path": str(tmp_path)}
        section = {"builder": "image_caption_json", "build_info": info}
        config = bind(DatasetConfig, section, section="datasets.mine", source="eval.yaml")
        return CaptionData(build_datasets({"mine": config}, ["test"])["mine"]["test"])

    return read


def test_lists_of_lavis_are_references_in_both_modes(read):
    data = read([{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": ["three"]}])
    assert data.references("separate") == {"a": ["one", "two"], "b": ["three"]}
    assert data.references("joined") == {"a": ["one two"], "b": ["three"]}


def test_caption_of_which_something_was_lost_is_named(read):
    with pytest.raises(SampleError, match="record 2: the caption cannot be read"):
        read([RECORDS[0], {"image_id": "b", "caption": "\ud83d"}])


def test_batches_hold_every_image_once_longest_first(read):
    assert read(RECORDS).batches(3) == [[1, 3, 0], [2]]


def test_batches_of_equal_length_keep_the_order_of_the_data(read):
    assert read(RECORDS).batches(1) == [[1], [3], [0], [2]]


def test_joined_reference_is_the_text_of_training(read):
    assert read(RECORDS).references("joined")["b"] == ["one two three four"]


def test_separate_references_are_the_single_captions(read):
    assert read(RECORDS).references("separate")["b"] == ["one two", "three four"]


def test_blank_captions_are_no_references(read):
    data = read([{"image_id": "a", "caption": "one", "captions": ["one", " "]}])
    assert data.references("separate") == {"a": ["one"]}
    with pytest.raises(ConfigError, match="record 1: --reference-mode separate needs the field 'captions'"):
        read([{"image_id": "a", "caption": "one", "captions": [" "]}]).references("separate")


def test_csv_file_holds_single_captions_as_json(read):
    data = read('image_id,caption,captions\na,one two,"[""one"", ""two""]"\n', "test.csv")
    assert data.references("separate") == {"a": ["one", "two"]}


def test_record_without_a_caption_is_named(read):
    with pytest.raises(SampleError, match=r"record 2: the field 'caption' is missing"):
        read([RECORDS[0], {"image_id": "b"}])


def test_several_records_of_an_image_are_its_single_captions(read):
    data = read("image,caption\nb.jpg,one\na.jpg,two\nb.jpg,three\n", "test.csv")
    assert data.references("separate") == {"b": ["one", "three"], "a": ["two"]}
    assert data.references("joined") == {"b": ["one three"], "a": ["two"]}
    assert data.image(1).shape == (3, 224, 224)


def test_list_of_captions_needs_no_joined_one(read):
    data = read([{"image": "a.jpg", "captions": ["one", "two"]}])
    assert data.references("joined") == {"a": ["one two"]}
    assert data.references("separate") == {"a": ["one", "two"]}


def test_images_of_different_files_must_not_share_an_id(read, tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "a.jpg")
    with pytest.raises(SampleError, match=r"more/a.jpg and \S+/a.jpg have the same id 'a'; give them a field image_id"):
        read([{"image": "a.jpg", "caption": "one"}, {"image": "more/a.jpg", "caption": "two"}])


def test_list_that_comes_twice_is_refused(read):
    with pytest.raises(SampleError, match="record 2: the image id 'a' comes twice"):
        read([RECORDS[0], RECORDS[0]])
