"""The JSON format: the published layouts, own fields, splits, conversations, and every kind of bad record."""

import json

import pytest
import torch

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets import ImageCaptionJsonBuilder, first_sample
from minigpt4.datasets.datasets.image_caption_json import conversation_fields
from minigpt4.models.prompting import read_samples


@pytest.fixture
def load(files):
    """The sample of a record of a file with these lines, or of its first record."""

    def load(*lines, name="a.jsonl", index=0, split="train", **info):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (files.folder / name).write_text("\n".join(texts) + "\n")
        info = {"ann_path": str(files.folder / name), "image_path": str(files.folder / "images"), **info}
        (sample,) = files.dataset("image_caption_json", split=split, **info).open(index, 1, None)
        return sample.load()

    return load


def test_cc_sbu_align_folder_is_read_without_cleaning_its_captions(files, tools):
    storage = files.folder / "cc_sbu_align"
    (storage / "image").mkdir(parents=True)
    (storage / "image" / "2.jpg").write_bytes(tools.picture())
    files.json("cc_sbu_align/filter_cap.json", {"annotations": [{"image_id": 2, "caption": "The image: A Cat!"}]})
    (lazy,) = files.dataset("image_caption_json", storage=str(storage)).open(0, 1, None)
    sample = lazy.load()
    assert (sample["image_id"], sample["answer"]) == ("2", "The image: A Cat!")
    assert (sample["image"].shape, sample["image"].pixels.dtype) == ((3, tools.size, tools.size), torch.uint8)


def test_own_fields_splits_and_lists_of_captions(files, load):
    files.images(["10", "a", "b"])
    assert load({"image_id": "10", "grounded_caption": "Two."}, caption_field="grounded_caption")["answer"] == "Two."
    assert load({"image_id": "a", "caption": ["A dog .", "", "A cat ."]})["answer"] == "A dog . A cat ."
    table = ("image_id,caption,split", "a,A bird.,train", "b,B bird.,test", "10,C bird.,train")
    assert load(*table, name="birds.csv", split="test", split_field="split")["image_id"] == "b"
    info = {"ann_path": str(files.folder / "birds.csv"), "image_path": "images", "split_field": "split"}
    builder = ImageCaptionJsonBuilder("birds", files.section("image_caption_json", **info))
    assert builder.splits() == ["test", "train"]
    assert {k: d.size for k, d in builder.build_datasets(["train", "test", "val"]).items()} == {"train": 2, "test": 1}


def test_fewer_samples_for_training_are_a_part_of_more_and_other_splits_stay_whole(files):
    file = files.json("birds.json", [{"image_id": str(number), "caption": "A."} for number in range(40)])
    info = {"ann_path": str(file), "test_ann_path": str(file), "image_path": str(files.images("a"))}
    few, more = (files.dataset("image_caption_json", max_samples=count, **info).selection.tolist() for count in (5, 20))
    assert (len(few), len(more), few == sorted(few)) == (5, 20, True)
    assert set(few) < set(more) != set(range(20))
    assert files.dataset("image_caption_json", max_samples=5, split="test", **info).size == 40
    assert files.dataset("image_caption_json", max_samples=50, **info).size == 40
    with pytest.raises(ConfigError, match="build_info.max_samples: is for annotation files"):
        files.section("image_caption_shards", storage="0.tar", max_samples=5)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"image_id": "a", "caption": "A."', "not JSON"),
        ('["a", "A."]', "not a record"),
        ('{"image_id": "a"}', "the field 'caption' is missing; it has image_id"),
        ('{"image_id": "a", "caption": " "}', "the caption is empty"),
        ('{"image_id": "a", "caption": []}', "the field 'caption' is missing"),
        ('{"image_id": "a", "caption": 5}', "the caption must be text"),
        ('{"image_id": "a", "caption": ["A.", null]}', "the captions must be a list of texts"),
        (r'{"image_id": "a", "caption": "a \ud83d"}', "the caption cannot be read: character 3 is"),
        (r'{"image_id": "a", "captions": ["a", "\udce9"]}', "caption 2 cannot be read"),
        ('{"image_id": "a", "caption": "a", "caption": "b"}', "not JSON .the field 'caption' stands twice"),
        ('{"caption": "A."}', "no image; set the field 'image' or 'image_id'"),
        ('{"image": 5, "caption": "A."}', "no image"),
        (r'{"image": "a\u0000.jpg", "caption": "A."}', "no image"),
        (f'{{"image": "{"a" * 300}.jpg", "caption": "A."}}', "the image .*aaa"),
        ('{"image_id": "gone", "caption": "A."}', "the image .*gone.jpg does not exist; .*image_suffix is .jpg"),
        ('{"image_id": "text", "caption": "A."}', ".*text.jpg: not an image"),
    ],
)
def test_bad_record_is_refused_with_line_and_reason(line, complaint, files, load):
    images = files.images("a")
    (images / "text.jpg").write_bytes(b"no picture")
    with pytest.raises(SampleError, match=f"a.jsonl, line 2: {complaint}"):
        load({"image_id": "a", "caption": "A."}, line, index=1)
    with pytest.raises(SampleError, match=r"line 2: the field 'caption' is missing; .*first line name"):
        load("a dog runs\t1.jpg", "a cat\t2.jpg", name="a.tsv")
    with pytest.raises(SampleError, match="line 1: the field 'part' is missing"):
        load({"image_id": "a", "caption": "A."}, split_field="part")


@pytest.mark.parametrize("image_id", ["\\udce9", pytest.param(0, id="number"), pytest.param("", id="none")])
def test_name_that_is_not_utf_8_is_only_a_name(files, tools, load, image_id):
    """As Python's own JSON writes the names that the file system gives."""
    (files.images([]) / "caf\udce9.jpg").write_bytes(tools.picture())
    sample = load({"image": "caf\udce9.jpg", "image_id": image_id, "caption": "A."})
    assert sample["image_id"].encode() in (b"\\udce9", b"0", b"caf\\udce9")


@pytest.mark.parametrize(
    ("split", "info", "complaint"),
    [
        ("val", {}, "datasets.birds: has no split 'val'; set build_info.val_ann_path"),
        ("val", {"val_ann_path": "gone.json"}, "datasets.birds: gone.json does not exist"),
        ("holiday", {}, "the splits are train, val, test"),
        ("test", {"split_field": "none"}, "has no records of the split 'test'"),
        ("test", {"test_ann_path": "{karpathy}"}, r"coco.json holds all splits; .* split_field: split"),
    ],
)
def test_split_without_data_is_refused(split, info, complaint, files):
    file = files.json("a.json", [{"image_id": "a", "caption": "A."}])
    images = [{"filename": "a.jpg", "imgid": 0, "split": "test", "sentences": [{"raw": "A."}]}]
    info = {key: value.format(karpathy=files.json("coco.json", {"images": images})) for key, value in info.items()}
    info = {"ann_path": str(file), "image_path": str(files.images("a")), **info}
    with pytest.raises(ConfigError, match=complaint):
        files.dataset("image_caption_json", split=split, **info)


# Conversations


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


@pytest.mark.parametrize("first", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it?"])
@pytest.mark.parametrize("form", [list, json.dumps])
def test_model_reads_questions_and_answers_with_the_image_first(first, form, files, load):
    files.images("7")
    record = {"id": 7, "image": "7.jpg", "turns": form(_turns(first, "A cat.", "Its colour?", "Black."))}
    sample = load(record, id_field="id", conversation_field="turns")
    assert "answer" not in sample
    fields = {key: [sample[key]] for key in ("conv_q", "conv_a", "connect_sym")}
    questions, answers = read_samples(fields).conversations[0]
    assert questions == ["<Img><ImageHere></Img> What is it?", "Its colour?"]
    assert answers == ["A cat.", "Black."]


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([], "must be a list of turns"),
        (_turns("a", "b", "c"), "an answer to each question"),
        (_turns("a", "b", "c", " "), "turn 4 is empty"),
        (_turns("<image>", "b"), "turn 1 is empty"),
        (_turns("a", "b")[::-1], 'turn 1 must be {"from": "human"'),
        (_turns("<image><image> a", "b"), "turn 1: a conversation has one image"),
        (_turns("a", "b", "<image> c", "d"), "turn 3: a conversation has one image"),
        (_turns("<ImageHere> a", "b"), "turn 1 holds"),
        (_turns("a?", "\0"), "turn 2 cannot be read"),
        ("[", "not JSON"),
        ({"from": "human"}, "must be a list of turns"),
    ],
)
def test_wrong_conversation_is_refused_by_its_turn(turns, complaint):
    with pytest.raises(SampleError, match=f"a.json, record 3: .*{complaint}"):
        conversation_fields(turns, "a.json, record 3")


# The first sample of a dataset, in a line


def test_line_tells_of_shards_and_cuts_long_texts(files, tools):
    assert first_sample(files.shards([2, 2])) == (
        "birds/train: 2 shards, number of samples unknown; first: image_id 000000000, "
        f"image {tools.size} x {tools.size}, 'a photo of 0'"
    )
    file = files.json("a.json", [{"image_id": "a", "caption": "long " * 50}])
    dataset = files.dataset("image_caption_json", ann_path=str(file), image_path=str(files.images(["a"])))
    assert first_sample(dataset).endswith("long long ...'")
