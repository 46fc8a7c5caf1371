"""References, results and the images of an evaluation: every form that people have, and the place of what is wrong."""

import json

import pytest
from PIL import Image

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets import build_datasets
from minigpt4.evaluation.caption_data import CaptionData, match, read_references, read_results

# The images of an evaluation

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
LISTED = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": ["three"]}]
LISTS = [{"image": "a.jpg", "captions": ["one", "two"]}]
BLANK = [{"image_id": "a", "caption": "one", "captions": ["one", " "]}]


@pytest.mark.parametrize(
    ("records", "name", "separate", "joined"),
    [
        (RECORDS[:1], "t.json", {"a": ["one", "two"]}, ["one two"]),
        (LISTED, "t.json", {"a": ["one", "two"], "b": ["three"]}, ["one two", "three"]),
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
        (MORE, r"more/a.jpg and \S+/a.jpg have the same id 'a'; give each a field image_id"),
    ],
)
def test_bad_record_is_named(read, tmp_path, records, text):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "a.jpg")
    with pytest.raises(SampleError, match=text):
        read(records)
    data = read([{"image_id": "a", "caption": "one", "captions": [" "]}])
    with pytest.raises(ConfigError, match="record 1: --reference-mode separate needs the field 'captions'"):
        data.references("separate")


# Files of references and results

SAID = ((42, "A dog."), (7, "A cat."), (42, "An animal."))
COCO = {"annotations": [{"image_id": image, "id": n, "caption": text} for n, (image, text) in enumerate(SAID)]}
COCO["images"] = [{"id": 42, "file_name": "42.jpg"}]
OURS = [{"image_id": "10", "grounded_caption": "One . Two .", "captions": ["One .", "Two ."]}]


def _file(tmp_path, content, name="references.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


FLICKR = """raw,sentids,split,filename,img_id
"[""One."", ""Two.""]","[0, 1]",test,10.jpg,0
"[""Three."", "" ""]","[2, 3]",val,11.jpg,1
"""
KARPATHY = {
    "images": [
        {"cocoid": 42, "filename": "a.jpg", "split": "test", "sentences": [{"raw": "One."}, {"raw": "Two."}]},
        {"filename": "b.jpg", "split": "restval", "sentences": [{"raw": "Three."}]},
    ]
}
LAVIS = [{"image": "img/10.jpg", "caption": ["One .", "Two ."], "image_id": "coco_10"}]
KAGGLE = "image_name| comment_number| comment\n10.jpg| 0| One .\n10.jpg| 4   Two .\n"
OWN = "image,caption\ndogs/10.jpg,One.\ndogs/10.jpg,Two.\n"


@pytest.mark.parametrize(
    ("content", "name", "split", "separate", "joined"),
    [
        (COCO, "coco.json", "test", {"42": ["A dog.", "An animal."], "7": ["A cat."]}, ["A dog. An animal.", "A cat."]),
        (OURS, "ours.json", "test", {"10": ["One .", "Two ."]}, ["One . Two ."]),
        (FLICKR, "flickr.csv", "test", {"10": ["One.", "Two."]}, ["One. Two."]),
        (FLICKR, "flickr.csv", "val", {"11": ["Three."]}, ["Three."]),
        (LAVIS, "lavis.json", "test", {"coco_10": ["One .", "Two ."]}, ["One . Two ."]),
        (KAGGLE, "results.csv", "test", {"10": ["One .", "Two ."]}, ["One . Two ."]),
        (KARPATHY, "coco.json", "test", {"42": ["One.", "Two."]}, ["One. Two."]),
        (KARPATHY, "coco.json", "train", {"b": ["Three."]}, ["Three."]),
        (OWN, "own.csv", "test", {"10": ["One.", "Two."]}, ["One. Two."]),
    ],
    ids=["COCO", "ours", "Flickr30k", "Flickr30k val", "LAVIS", "Kaggle", "Karpathy", "Karpathy train", "own"],
)
def test_references_are_read_from_every_form_in_both_modes(tmp_path, content, name, split, separate, joined):
    path = _file(tmp_path, content, name)
    assert read_references(path, "separate", split) == separate
    assert read_references(path, "joined", split) == {key: [text] for key, text in zip(separate, joined, strict=True)}


def test_numbered_images_are_also_known_by_their_files(tmp_path):
    images = [{"id": 42, "file_name": "COCO_val2014_42.jpg"}, {"id": 7, "file_name": "42.jpg"}]
    annotations = [{"image_id": 42, "caption": "A dog."}, {"image_id": 7, "caption": "A cat."}]
    path = _file(tmp_path, {"images": images, "annotations": annotations})
    for known in ([], ["42"], ["7", "COCO_val2014_42"]):
        assert list(read_references(path, "separate", known=known)) == ["42", "7"]
    by_name = {"COCO_val2014_42": ["A dog."], "42": ["A cat."]}
    assert read_references(path, "separate", known=["COCO_val2014_42"]) == by_name


def test_joined_caption_alone_is_no_set_of_references_and_an_empty_split_an_error(tmp_path):
    with pytest.raises(SampleError, match="holds no references .*'dev'"):
        read_references(_file(tmp_path, FLICKR, "flickr.csv"), "joined", "dev")
    path = _file(tmp_path, [{"image_id": "10", "grounded_caption": "One . Two ."}])
    assert read_references(path, "joined") == {"10": ["One . Two ."]}
    with pytest.raises(SampleError, match=r"image 10: has one joined caption, but no list 'captions'"):
        read_references(path, "separate")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"caption": "a"}, "record 1: the field 'image_id' must be text or a number; it is None"),
        ({"image_id": True, "caption": "a"}, "'image_id' must be text or a number; it is True"),
        ({"image_id": 1}, "record 1: no reference"),
        ({"image_id": 1, "caption": " "}, "record 1: the field 'caption' must be text with words"),
        ({"raw": '[" "]', "split": "test", "filename": "1.jpg"}, "record 1: no reference"),
        ({"image_id": 1, "caption": 5}, "the field 'caption' must be text with words; it is 5"),
        ({"image_id": 1, "captions": [3]}, "must be a list of texts"),
        ({"image_id": 1, "captions": "[3"}, "are not JSON"),
        ({"image_id": 1, "caption": "\ud83d"}, "record 1: the caption cannot be read"),
        ({"image_id": 1, "captions": ["a", "\ud83d"]}, "record 1: caption 2 cannot be read"),
    ],
)
def test_bad_reference_is_named_with_its_place(tmp_path, record, text):
    with pytest.raises(SampleError, match=text):
        read_references(_file(tmp_path, [record]), "separate")


def test_results_are_captions_by_image_which_may_be_empty_and_failed_images_are_left_out(tmp_path):
    records = [{"image_id": 42, "caption": "A dog."}, {"image_id": "7", "caption": ""}]
    failed = {"image_id": 8, "image": "8.jpg", "error": "8.jpg: not an image"}
    assert read_results(_file(tmp_path, [*records, failed])) == {"42": "A dog.", "7": ""}


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([], "holds no captions"),
        ([{"image_id": 1}], "record 1: the field 'caption' must be text; it is None"),
        ([{"image_id": 1, "caption": "\ud83d"}], "record 1: the caption cannot be read"),
        ([{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}], "record 2: the image 1 comes twice"),
    ],
)
def test_bad_result_is_named_with_its_place(tmp_path, results, text):
    with pytest.raises(SampleError, match=text):
        read_results(_file(tmp_path, results))


def test_images_without_reference_or_caption_are_an_error_unless_a_part_is_wanted():
    references = {"7": ["a"], "8": ["b"]}
    with pytest.raises(SampleError, match="1 images have no reference: 9"):
        match({"7": "a", "9": "b"}, references, partial=True)
    with pytest.raises(SampleError, match="1 images of the references have no caption: 8; with --partial"):
        match({"7": "a"}, references, partial=False)
    assert match({"7": "a"}, references, partial=True) == {"7": ["a"]}
