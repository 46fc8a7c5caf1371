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


CSV = 'image_id,caption,captions\na,one two,"[""one"", ""two""]"\n'
SEVERAL = "image,caption\nb.jpg,one\na.jpg,two\nb.jpg,three\n"
LAVIS = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": ["three"]}]
LISTS = [{"image": "a.jpg", "captions": ["one", "two"]}]
BLANK = [{"image_id": "a", "caption": "one", "captions": ["one", " "]}]


@pytest.mark.parametrize(
    ("records", "name", "separate", "joined"),
    [
        (
            RECORDS[:2],
            "t.json",
            {"a": ["one", "two"], "b": ["one two", "three four"]},
            ["one two", "one two three four"],
        ),
        (LAVIS, "t.json", {"a": ["one", "two"], "b": ["three"]}, ["one two", "three"]),
        (LISTS, "t.json", {"a": ["one", "two"]}, ["one two"]),
        (BLANK, "t.json", {"a": ["one"]}, ["one"]),
        (CSV, "t.csv", {"a": ["one", "two"]}, ["one two"]),
        (SEVERAL, "t.csv", {"b": ["one", "three"], "a": ["two"]}, ["one three", "two"]),
    ],
    ids=["ours", "LAVIS", "lists", "blank", "CSV", "several records"],
)
def test_images_have_references_in_both_modes(read, records, name, separate, joined):
    data = read(records, name)
    assert data.references("separate") == separate
    assert data.references("joined") == {key: [text] for key, text in zip(separate, joined, strict=True)}
    assert data.image(len(data) - 1).shape == (3, 224, 224)


@pytest.mark.parametrize(("size", "batches"), [(3, [[1, 3, 0], [2]]), (1, [[1], [3], [0], [2]])])
def test_batches_hold_every_image_once_longest_first(read, size, batches):
    assert read(RECORDS).batches(size) == batches


MORE = [{"image": "a.jpg", "caption": "one"}, {"image": "more/a.jpg", "caption": "two"}]


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([RECORDS[0], {"image_id": "b", "caption": "\ud83d"}], "record 2: the caption cannot be read"),
        ([RECORDS[0], {"image_id": "b"}], "record 2: the field 'caption' is missing"),
        ([RECORDS[0], RECORDS[0]], "record 2: the image id 'a' comes twice"),
        (MORE, r"more/a.jpg and \S+/a.jpg have the same id 'a'; give them a field image_id"),
    ],
)
def test_bad_record_is_named(read, tmp_path, records, text):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "a.jpg")
    with pytest.raises(SampleError, match=text):
        read(records)


def test_blank_single_captions_are_none(read):
    data = read([{"image_id": "a", "caption": "one", "captions": [" "]}])
    with pytest.raises(ConfigError, match="record 1: --reference-mode separate needs the field 'captions'"):
        data.references("separate")
