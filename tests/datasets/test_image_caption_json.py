"""The JSON format: the published layouts, own fields, splits, and every kind of bad record."""

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.registry import registry
from minigpt4.datasets import ImageCaptionJsonBuilder
from minigpt4.processors import Blip2ImageTrainProcessor


def _load(dataset, index=0):
    (sample,) = dataset.open(index, 1, None)
    return sample.load()


def test_cc_sbu_align_folder_is_read_without_cleaning_its_captions(files, tools):
    storage = files.folder / "cc_sbu_align"
    (storage / "image").mkdir(parents=True)
    (storage / "image" / "2.jpg").write_bytes(tools.picture())
    files.json("cc_sbu_align/filter_cap.json", {"annotations": [{"image_id": 2, "caption": "The image: A Cat!"}]})
    sample = _load(files.dataset("image_caption_json", storage=str(storage)))
    assert (sample["image_id"], sample["answer"]) == ("2", "The image: A Cat!")
    assert sample["image"].shape == (3, tools.size, tools.size)
    assert sample["image"].pixels.dtype == torch.uint8


def test_flickr_split_files_are_read(files):
    images = files.images(["10", "11"])
    paths = {
        "ann_path": files.json("train.json", [{"image_id": "10", "grounded_caption": "Two guys."}]),
        "val_ann_path": files.json("val.json", [{"image_id": "11", "grounded_caption": "A dog."}]),
    }
    info = {key: str(path) for key, path in paths.items()} | {"image_path": str(images)}
    answers = [
        _load(files.dataset("image_caption_json", split=split, caption_field="grounded_caption", **info))["answer"]
        for split in ("train", "val")
    ]
    assert answers == ["Two guys.", "A dog."]


def test_conversation_records_give_the_model_its_fields(files, tools):
    images = files.folder / "images" / "coco"
    images.mkdir(parents=True)
    (images / "7.png").write_bytes(tools.picture())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    file = files.json("talk.json", [{"id": 7, "image": "coco/7.png", "conversations": turns}])
    info = {"ann_path": str(file), "image_path": str(images.parent)}
    sample = _load(files.dataset("image_caption_json", id_field="id", conversation_field="conversations", **info))
    assert (sample["conv_q"], sample["conv_a"]) == ("<Img><ImageHere></Img> What?", "A cat.")
    assert "answer" not in sample


def test_split_field_parts_one_file(files):
    images = files.images("abc")
    file = files.folder / "birds.csv"
    file.write_text("image_id,caption,split\na,A bird.,train\nb,B bird.,test\nc,C bird.,train\n")
    info = {"ann_path": str(file), "image_path": str(images), "split_field": "split"}
    builder = ImageCaptionJsonBuilder("birds", files.section("image_caption_json", **info))
    assert builder.splits() == ["test", "train"]
    built = builder.build_datasets(["train", "test", "val"])
    assert {split: dataset.size for split, dataset in built.items()} == {"train": 2, "test": 1}
    assert _load(built["test"])["image_id"] == "b"


MODES = [("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")]


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_images_of_every_mode_are_read_as_rgb(mode, kind, files, tools):
    content = tools.picture(3, mode, kind)
    (files.images([]) / "a.jpg").write_bytes(content)
    file = files.json("a.json", [{"image_id": "a", "caption": "A."}])
    dataset = files.dataset("image_caption_json", ann_path=str(file), image_path=str(files.folder / "images"))
    with Image.open(files.folder / "images" / "a.jpg") as image:
        wanted = Blip2ImageTrainProcessor(image_size=tools.size)(image.convert("RGB"))
    assert torch.equal(tools.seen(_load(dataset)["image"]), wanted)


def test_exif_rotated_image_is_read_upright(files, tools):
    exif = Image.Exif()
    exif[0x0112] = 6
    images = files.images([])
    (images / "turned.jpg").write_bytes(tools.picture(3, exif=exif))
    (images / "plain.jpg").write_bytes(tools.picture(3))
    file = files.json("a.json", [{"image_id": name, "caption": "A."} for name in ("turned", "plain")])
    dataset = files.dataset("image_caption_json", ann_path=str(file), image_path=str(images))
    with Image.open(images / "plain.jpg") as image:
        upright = Blip2ImageTrainProcessor(image_size=tools.size)(image.transpose(Image.Transpose.ROTATE_270))
    turned, plain = (tools.seen(_load(dataset, index)["image"]) for index in range(2))
    assert torch.equal(turned, upright)
    assert not torch.equal(turned, plain)


BAD_LINES = {
    '{"image_id": "a", "caption": "A."': "line 2: not JSON",
    '["a", "A."]': "line 2: not a record",
    '{"image_id": "a"}': "line 2: the field 'caption' is missing; it has image_id",
    '{"image_id": "a", "caption": " "}': "line 2: the caption is empty",
    '{"image_id": "a", "caption": 5}': "line 2: the caption must be text",
    '{"image_id": "a", "caption": ["A.", null]}': "line 2: the captions must be a list of texts",
    r'{"image_id": "a", "caption": "a \ud83d"}': "line 2: the caption cannot be read: character 3 is",
    r'{"image_id": "a", "caption": "a \u001b$B"}': "line 2: the caption cannot be read: character 3 is",
    r'{"image_id": "a", "caption": "a \u0000"}': "line 2: the caption cannot be read: character 3 is NUL",
    '{"image_id": "a", "caption": "a \ufffd"}': "line 2: the caption cannot be read: character 3 is",
    r'{"image_id": "a", "captions": ["a", "\udce9"]}': "line 2: caption 2 cannot be read",
    '{"image_id": "a", "caption": "a", "caption": "b"}': "line 2: not JSON .the field 'caption' stands twice",
    f'{{"image_id": "a", "caption": {"[" * 100_000}': "line 2: not JSON .nested too deeply",
    f'{{"image": "{"a" * 5000}", "caption": "a"}}': "line 2: the image .*: ",
    '{"image_id": "a", "caption": []}': "line 2: the field 'caption' is missing",
    '{"image_id": "a", "caption": [" "]}': "line 2: the caption is empty",
    '{"caption": "A."}': "line 2: no image; set the field 'image' or 'image_id'",
    '{"image": 5, "caption": "A."}': "line 2: no image",
    '{"image_id": "gone", "caption": "A."}': "line 2: the image .*gone.jpg does not exist",
    '{"image_id": "cut", "caption": "A."}': "line 2: .*cut.jpg: .*(damaged|cut off)",
    '{"image_id": "text", "caption": "A."}': "line 2: .*text.jpg: not an image",
    '{"image_id": "huge", "caption": "A."}': "line 2: .*huge.jpg: the image is too large",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_record_is_refused_with_line_and_reason(line, files, tools, monkeypatch):
    images = files.images("a")
    (images / "cut.jpg").write_bytes(tools.picture(kind="JPEG", size=(64, 64))[:600])
    (images / "text.jpg").write_bytes(b"no picture")
    (images / "huge.jpg").write_bytes(tools.picture(size=(300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    (files.folder / "a.jsonl").write_text(f'{{"image_id": "a", "caption": "A."}}\n{line}\n')
    dataset = files.dataset(
        "image_caption_json", ann_path=str(files.folder / "a.jsonl"), image_path=str(files.folder / "images")
    )
    with pytest.raises(SampleError, match=BAD_LINES[line]):
        _load(dataset, 1)
    assert _load(dataset, 0)["answer"] == "A."


@pytest.mark.parametrize("image_id", ["\\udce9", pytest.param(0, id="number"), pytest.param("", id="none")])
def test_name_that_is_not_utf_8_is_only_a_name(files, tools, image_id):
    """As Python's own JSON writes the names that the file system gives."""
    (files.images([]) / "caf\udce9.jpg").write_bytes(tools.picture())
    file = files.json("a.json", [{"image": "caf\udce9.jpg", "image_id": image_id, "caption": "A."}])
    sample = _load(files.dataset("image_caption_json", ann_path=str(file), image_path=str(files.folder / "images")))
    assert sample["image_id"].encode() in (b"\\udce9", b"0", b"caf\\udce9")


TURNS = [
    (r'[{"from": "human", "value": "\ud83d?"}, {"from": "gpt", "value": "a"}]', "turn 1 cannot be read"),
    (r'[{"from": "human", "value": "a?"}, {"from": "gpt", "value": "\u0000"}]', "turn 2 cannot be read"),
    ("[" * 100_000, "the conversation is not JSON .nested too deeply"),
]


@pytest.mark.parametrize(("turns", "complaint"), TURNS)
def test_bad_conversation_is_refused_with_line_and_turn(turns, complaint, files):
    images = files.images("a")
    quoted = turns.replace('"', '""')
    (files.folder / "a.csv").write_text(f'image_id,conversations\na,"{quoted}"\n')
    info = {"ann_path": str(files.folder / "a.csv"), "image_path": str(images), "conversation_field": "conversations"}
    with pytest.raises(SampleError, match=f"line 2: {complaint}"):
        _load(files.dataset("image_caption_json", **info))


def test_table_without_its_first_line_is_said_to_lack_it(files):
    (files.folder / "a.tsv").write_text("a dog runs\thttp://a.b/1.jpg\na cat\thttp://a.b/2.jpg\n")
    info = {"ann_path": str(files.folder / "a.tsv"), "image_path": str(files.images("a"))}
    with pytest.raises(
        SampleError, match=r"'caption' is missing; it has a dog runs, .*1.jpg; the first line must name"
    ):
        _load(files.dataset("image_caption_json", **info))


def test_record_without_its_split_is_a_bad_record_of_training(files):
    file = files.json("a.json", [{"image_id": "a", "caption": "A."}])
    info = {"ann_path": str(file), "image_path": str(files.images("a")), "split_field": "part"}
    with pytest.raises(SampleError, match="record 1: the field 'part' is missing"):
        _load(files.dataset("image_caption_json", **info))


@pytest.mark.parametrize(
    ("split", "info", "complaint"),
    [
        ("val", {}, "datasets.birds: has no split 'val'; set build_info.val_ann_path"),
        ("val", {"val_ann_path": "gone.json"}, "datasets.birds: gone.json does not exist"),
        ("holiday", {}, "the splits are train, val, test"),
        ("train", {"split_field": "none"}, None),
        ("test", {"split_field": "none"}, "has no records of the split 'test'"),
    ],
)
def test_split_without_data_is_refused(split, info, complaint, files):
    file = files.json("a.json", [{"image_id": "a", "caption": "A."}])
    info = {"ann_path": str(file), "image_path": str(files.images("a")), **info}
    if complaint is None:
        assert files.dataset("image_caption_json", split=split, **info).size == 1
        return
    with pytest.raises(ConfigError, match=complaint):
        files.dataset("image_caption_json", split=split, **info)


def test_order_of_units_is_that_of_the_file(files):
    dataset = files.records(3)
    assert [_load(dataset, index)["image_id"] for index in np.arange(3)] == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["cc_sbu_align", "flickr30k_grounded_detail", "image_caption_json"])
def test_published_names_are_names_of_the_format(name):
    assert registry.get_builder_class(name) is ImageCaptionJsonBuilder
