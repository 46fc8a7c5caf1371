"""The shard format: tars as img2dataset writes them, and everything that may be wrong with one."""

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.registry import registry
from minigpt4.datasets import ImageCaptionShardsBuilder
from minigpt4.datasets.datasets.base_dataset import generator

CASES = Path(__file__).parents[1] / "data/cases"


def _read(dataset, readers=1):
    """Good samples by key, and the reasons of the bad ones."""
    good, bad = {}, []
    for shard in range(dataset.num_shards(readers)):
        for lazy in dataset.open(shard, readers, None):
            try:
                sample = lazy.load()
                good[sample["image_id"]] = sample
            except SampleError as error:
                bad.append(str(error))
    return good, bad


def _one(files, members):
    path = files.tar("one.tar", members)
    return _read(files.dataset("image_caption_shards", storage=str(path)))


def test_caption_comes_from_json_and_is_cleaned(files, tools):
    good, bad = _one(files, [*files.pair(7), ("000000007.txt", b"not this")])
    assert not bad
    assert good["000000007"]["answer"] == "a photo of 7"
    assert good["000000007"]["image"].shape == (3, tools.size, tools.size)


@pytest.mark.parametrize("beside", [[], [("a.json", b'{"caption": null}')], [("a.json", b'{"url": "x"}')]])
def test_text_file_is_the_caption_where_json_has_none(beside, files, tools):
    good, bad = _one(files, [("a.webp", tools.picture(kind="WEBP")), *beside, ("a.txt", b"A Cat.\n")])
    assert not bad
    assert good["a"]["answer"] == "a cat"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(("name", "text"), [("a.txt", "A café"), ("a.json", '{"caption": "A café"}')])
def test_text_that_shows_its_encoding_is_read(files, tools, encoding, name, text):
    good, bad = _one(files, [("a.png", tools.picture()), (name, text.encode(encoding))])
    assert not bad
    assert good["a"]["answer"] == "a café"


@pytest.mark.parametrize("name", ["bom.tar", "utf16.tar"])
def test_text_of_a_published_shard_is_read_without_its_mark(files, name):
    good, bad = _read(files.dataset("image_caption_shards", storage=str(CASES / name)))
    assert not bad
    assert {sample["answer"] for sample in good.values()} == {"a café on the red river"}


@pytest.mark.parametrize(("encoding", "text"), [("utf-16-le", "кот"), ("iso2022_jp", "赤い猫")])
def test_text_whose_bytes_happen_to_be_ascii_is_a_bad_sample(files, tools, encoding, text):
    good, (bad,) = _one(files, [("a.png", tools.picture()), ("a.txt", text.encode(encoding))])
    assert not good
    assert "one.tar/a: the caption cannot be read" in bad


@pytest.mark.parametrize(("suffix", "kind"), [("avif", "AVIF"), ("jfif", "JPEG"), ("jp2", "JPEG2000")])
def test_images_of_rarer_kinds_are_read(files, tools, suffix, kind):
    good, bad = _one(files, [(f"a.{suffix}", tools.picture(kind=kind)), ("a.txt", b"A cat")])
    assert (list(good), bad) == (["a"], [])


def test_name_that_is_not_utf_8_is_only_a_name(files, tools):
    good, bad = _one(files, [("caf\udce9.png", tools.picture()), ("caf\udce9.txt", b"A cat")])
    assert (list(good), bad) == (["caf\\udce9"], [])


def test_caption_field_is_chosen_by_the_configuration(files, tools):
    path = files.tar("a.tar", [("a.JPG", tools.picture()), ("a.json", b'{"top_caption": "Best", "caption": "x"}')])
    good, _ = _read(files.dataset("image_caption_shards", storage=str(path), caption_field="top_caption"))
    assert good["a"]["answer"] == "best"


BAD = {
    "no image": ([("a.json", b'{"caption": "A."}')], "one.tar/a: no image; the sample has json"),
    "no caption": ([("a.png", None)], "one.tar/a: no caption"),
    "empty caption": ([("a.png", None), ("a.json", b'{"caption": " "}')], "one.tar/a: the caption is empty"),
    "empty text": ([("a.png", None), ("a.txt", b"\n")], "one.tar/a: the caption is empty"),
    "only dots": ([("a.png", None), ("a.txt", b"...")], "one.tar/a: nothing is left of the caption"),
    "number": ([("a.png", None), ("a.json", b'{"caption": 5}')], "one.tar/a: the caption must be text"),
    "wrong json": ([("a.png", None), ("a.json", b"{"), ("a.txt", b"x")], "one.tar/a.json: not JSON"),
    "json list": ([("a.png", None), ("a.json", b"[]")], "one.tar/a.json: must be an object"),
    "latin text": ([("a.png", None), ("a.txt", b"caf\xe9")], "one.tar/a.txt: not UTF-8 text (byte 0xe9 in line 1)"),
    "cut UTF-16": ([("a.png", None), ("a.txt", b"\xff\xfea")], "one.tar/a.txt: not UTF-16 text"),
    "unmarked UTF-16": ([("a.png", None), ("a.txt", "a é".encode("utf-16-le"))], "one.tar/a.txt: not UTF-8 text"),
    "NUL": ([("a.png", None), ("a.txt", b"a\0 dog")], "one.tar/a: the caption cannot be read: character 2 is NUL"),
    "lost": ([("a.png", None), ("a.txt", "a \ufffd".encode())], "one.tar/a: the caption cannot be read: character 3"),
    "half": ([("a.png", None), ("a.json", b'{"caption": "\\ud83d"}')], "one.tar/a: the caption cannot be read"),
    "latin json": ([("a.png", None), ("a.json", b'{"caption": "\xe9"}')], "one.tar/a.json: not JSON: not UTF-8 text"),
    "deep json": ([("a.png", None), ("a.json", b"[" * 100_000)], "one.tar/a.json: not JSON: nested too deeply"),
    "twice": (
        [("a.png", None), ("a.json", b'{"caption": "a", "caption": "b"}')],
        "one.tar/a.json: not JSON: the field",
    ),
    "no picture": ([("a.jpg", b"hello"), ("a.txt", b"x")], "one.tar/a.jpg: not an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_is_one_and_its_neighbours_are_read(kind, files, tools):
    members, complaint = BAD[kind]
    members = [(name, tools.picture() if content is None else content) for name, content in members]
    good, bad = _one(files, [*files.pair(1), *members, *files.pair(2)])
    assert list(good) == ["000000001", "000000002"]
    assert len(bad) == 1
    assert complaint in bad[0]


def test_truncated_and_huge_images_are_bad(files, tools, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    cut = tools.picture(kind="JPEG", size=(64, 64))[:600]
    members = [("a.jpg", cut), ("a.txt", b"x"), ("b.png", tools.picture(size=(300, 300))), ("b.txt", b"x")]
    good, bad = _one(files, [*files.pair(1), *members])
    assert list(good) == ["000000001"]
    assert "a.jpg: the image is damaged or cut off" in bad[0]
    assert "b.png: the image is too large" in bad[1]
    assert len(bad) == 2


def test_members_that_are_no_samples_are_passed_over(files):
    good, bad = _one(files, [("README", b"x"), ("__meta__", b"x"), *files.pair(1)])
    assert (list(good), bad) == (["000000001"], [])


THREE_SAMPLES = 3 * 4 * 512  # two members of two blocks each


@pytest.mark.parametrize("more", [0, 20, 512 + 20], ids=["at a boundary", "in a header", "in an image"])
def test_cut_shard_gives_what_comes_before_the_cut_and_one_bad_record(more, files):
    path = files.shard("cut.tar", range(5))
    with path.open("r+b") as tar:
        tar.truncate(THREE_SAMPLES + more)
    good, bad = _read(files.dataset("image_caption_shards", storage=str(path)))
    assert list(good) == ["000000000", "000000001", "000000002"]
    assert len(bad) == 1
    assert "cut.tar: the shard is cut off or damaged after 3 samples" in bad[0]


def test_damaged_header_ends_a_shard_with_a_bad_record(files):
    path = files.shard("hit.tar", range(5))
    with path.open("r+b") as tar:
        tar.seek(THREE_SAMPLES)
        tar.write(b"?" * 512)
    good, bad = _read(files.dataset("image_caption_shards", storage=str(path)))
    assert (len(good), len(bad)) == (3, 1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"not a tar at all" * 100, "cannot be read"),
        (bytes(10240), "holds no samples"),
    ],
    ids=["missing", "empty file", "no tar", "tar of nothing"],
)
@pytest.mark.parametrize("readers", [1, 5])
def test_unreadable_shard_is_one_bad_record_for_any_number_of_readers(content, complaint, readers, files):
    if content is not None:
        (files.folder / "s-1.tar").write_bytes(content)
    for number, keys in ((0, range(2)), (2, range(2, 5))):
        files.shard(f"s-{number}.tar", keys)
    good, bad = _read(files.dataset("image_caption_shards", storage=f"{files.folder}/s-{{0..2}}.tar"), readers)
    assert len(good) == 5
    assert len(bad) == 1
    assert "s-1.tar" in bad[0]
    assert complaint in bad[0]


def test_urls_and_compressed_tars_are_read(files):
    path = files.shard("a.tar", range(3))
    packed = path.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for url in (f"pipe:cat {path}", f"file:{path}", str(packed)):
        good, bad = _read(files.dataset("image_caption_shards", storage=url))
        assert (len(good), bad) == (3, [])


def test_pipe_whose_command_fails_is_a_bad_record(files):
    good, bad = _read(files.dataset("image_caption_shards", storage=f"pipe:cat {files.folder}/gone.tar 2>/dev/null"))
    assert (good, len(bad)) == ({}, 1)


def test_two_samples_of_one_name_are_two(files, tools):
    pair = [("a.png", tools.picture()), ("a.json", json.dumps({"caption": "one"}).encode())]
    samples = list(files.dataset("image_caption_shards", storage=str(files.tar("a.tar", pair * 2))).open(0, 1, None))
    assert [sample.key for sample in samples] == ["a", "a"]


def test_shuffle_changes_the_order_inside_a_shard_and_repeats_itself(files):
    dataset = files.shards([30])

    def keys(*seed):
        return [sample.key for sample in dataset.open(0, 1, generator(*seed))]

    assert keys(1) == keys(1) != keys(2)
    assert sorted(keys(1)) == [sample.key for sample in dataset.open(0, 1, None)]


def test_split_has_shards_of_its_own(files):
    train, val = files.shard("train.tar", range(2)), files.shard("val.tar", range(2, 3))
    info = {"storage": str(train), "val_storage": str(val)}
    good, _ = _read(files.dataset("image_caption_shards", split="val", **info))
    assert list(good) == ["000000002"]
    with pytest.raises(ConfigError, match="set build_info.test_storage"):
        files.dataset("image_caption_shards", split="test", **info)


@pytest.mark.parametrize("name", ["laion", "cc_sbu", "image_caption_shards"])
def test_published_names_are_names_of_the_format(name):
    assert registry.get_builder_class(name) is ImageCaptionShardsBuilder
