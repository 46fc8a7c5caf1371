"""Files of COCO and Karpathy as records, and as datasets whose images are found."""

import json
from pathlib import Path

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets import ImageCaptionJsonBuilder
from minigpt4.datasets.datasets.image_caption_json import Records

CASES = Path(__file__).parents[1] / "data/cases"
SENTENCES = [{"raw": "A man cooks.", "tokens": ["a", "man", "cooks"]}, {"raw": " A cook. \n"}]
COCO_KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000391895.jpg",
            "cocoid": 391895,
            "imgid": 0,
            "split": "test",
            "sentences": SENTENCES,
        },
        {"filepath": "val2014", "filename": "b.jpg", "cocoid": 7, "imgid": 1, "split": "restval", "sentences": []},
    ],
}
FLICKR_KARPATHY = {
    "dataset": "flickr30k",
    "images": [{"filename": "1000092795.jpg", "imgid": 0, "split": "train", "sentences": SENTENCES[:1]}],
}
COCO = {
    "images": [{"id": 42, "file_name": "000000000042.jpg"}],
    "annotations": [
        {"image_id": 42, "id": 1, "caption": "A dog."},
        {"image_id": 42, "id": 2, "caption": "An animal."},
        {"image_id": 43, "id": 3, "caption": "A cat."},
    ],
}


@pytest.fixture
def read(tmp_path):
    """All records of a JSON file with this content."""

    def read(content):
        (tmp_path / "captions.json").write_text(json.dumps(content))
        records = Records(tmp_path / "captions.json")
        return [records[index] for index in range(len(records))]

    return read


def test_karpathy_image_is_a_record_with_its_captions(read):
    assert read(COCO_KARPATHY)[0] == {
        "image_id": "391895",
        "image": "val2014/COCO_val2014_000000391895.jpg",
        "imgid": 0,
        "split": "test",
        "captions": ["A man cooks.", "A cook."],
        "caption": "A man cooks. A cook.",
    }


def test_rest_of_val_is_for_training(read):
    assert read(COCO_KARPATHY)[1]["split"] == "train"


def test_karpathy_image_without_coco_id_is_named_by_its_file(read):
    (record,) = read(FLICKR_KARPATHY)
    assert (record["image_id"], record["image"], record["split"]) == ("1000092795", "1000092795.jpg", "train")


def test_coco_annotation_knows_the_file_of_its_image(read):
    assert [record.get("image") for record in read(COCO)] == ["000000000042.jpg", "000000000042.jpg", None]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"sentences": [], "filename": "a.jpg", "split": "test"}, "record 2: the caption is empty"),
        ({"sentences": "a", "filename": "a.jpg", "split": "test"}, "record 2: the caption is empty"),
        ({"sentences": SENTENCES, "split": "test"}, "record 2: no image"),
        ({"sentences": SENTENCES, "filename": "gone.jpg", "split": "test"}, "record 2: the image .*gone.jpg does not"),
    ],
)
def test_bad_karpathy_image_is_named(image, reason, files):
    images = files.images([])
    good = COCO_KARPATHY["images"][0]
    file = files.json("dataset.json", {"images": [good, image]})
    info = {"ann_path": str(file), "image_path": str(images), "split_field": "split"}
    dataset = files.dataset("image_caption_json", split="test", **info)
    with pytest.raises(SampleError, match=reason):
        dataset.look(1)


def test_sentence_without_text_is_a_bad_record(files):
    image = {"sentences": [*SENTENCES, {"raw": None}], "filename": "a.jpg", "split": "test"}
    info = {"ann_path": str(files.json("a.json", {"images": [image]})), "image_path": str(files.images(["a"]))}
    with pytest.raises(SampleError, match="record 1: the captions must be a list of texts"):
        files.dataset("image_caption_json", split="test", split_field="split", **info).look(0)


def test_coco_file_that_gives_an_id_to_two_images_is_refused(read):
    images = [*COCO["images"], {"id": 42, "file_name": "other.jpg"}, {"id": [7], "file_name": "7.jpg"}]
    with pytest.raises(ConfigError, match="two images have the id 42: '000000000042.jpg' and 'other.jpg'"):
        read({**COCO, "images": images})


def test_coco_ids_that_are_no_names_name_nothing(read):
    annotations = [{"image_id": [42], "caption": "A."}, {"image_id": {}, "caption": "B."}]
    assert read({"images": [{"id": [42], "file_name": "a.jpg"}], "annotations": annotations}) == annotations


def test_list_of_captions_of_lavis_is_joined_for_training(files):
    file = CASES / "lavis_flickr30k_test.json"
    images = files.images(range(1000, 1012))
    images.rename(files.folder / "img")
    dataset = files.dataset("image_caption_json", ann_path=str(file), image_path=str(files.folder))
    _, sample = dataset.look(11)
    assert sample == {"image_id": "1011", "answer": "A dog runs . Two men stand . A dog , running ."}


KAGGLE = """image_name| comment_number| comment
1.jpg| 0| Two " young " guys , one in a hat .
1.jpg| 1| " Stop " says a sign .
2199200615.jpg| 4   A dog runs across the grass .
"""


@pytest.mark.parametrize("fields", [{}, {"image_field": "image_name", "caption_field": "comment"}])
def test_flickr30k_of_kaggle_is_read_with_its_row_that_lacks_a_bar(files, fields):
    (files.folder / "results.csv").write_text(KAGGLE)
    images = files.images([1, 2199200615])
    info = {"ann_path": str(files.folder / "results.csv"), "image_path": str(images), **fields}
    dataset = files.dataset("image_caption_json", **info)
    assert [tuple(dataset.look(index)[1].values()) for index in range(dataset.size)] == [
        ("1", 'Two " young " guys , one in a hat .'),
        ("1", '" Stop " says a sign .'),
        ("2199200615", "A dog runs across the grass ."),
    ]


def test_splits_of_a_karpathy_file_are_those_of_its_images(files):
    info = {"ann_path": str(files.json("dataset_coco.json", COCO_KARPATHY)), "image_path": str(files.images([]))}
    builder = ImageCaptionJsonBuilder("coco", files.section("image_caption_json", split_field="split", **info))
    assert builder.splits() == ["test", "train"]
    assert builder.build("test").size == 1


def test_karpathy_file_is_not_taken_for_one_split(files):
    info = {"test_ann_path": str(files.json("dataset_coco.json", COCO_KARPATHY)), "image_path": str(files.images([]))}
    builder = ImageCaptionJsonBuilder("coco", files.section("image_caption_json", **info))
    with pytest.raises(ConfigError, match=r"dataset_coco.json holds all splits; .* split_field: split"):
        builder.build("test")
