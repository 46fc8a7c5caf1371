"""The shard format: tars as img2dataset writes them, and everything that may be wrong with one."""

import gzip

import pytest

from minigpt4.common.errors import ConfigError


@pytest.fixture
def one(files, tools):
    """Good samples and reasons of the bad ones of a tar of these members; None: an image."""

    def one(*members, **info):
        members = [(name, tools.picture() if content is None else content) for name, content in members]
        return tools.read(files.dataset("image_caption_shards", storage=str(files.tar("one.tar", members)), **info))

    return one


@pytest.mark.parametrize(
    ("members", "answer"),
    [
        ([("a.json", b'{"caption": "A photo of: 7!"}'), ("a.txt", b"not this")], "a photo of 7"),
        ([("a.json", b'{"caption": null}'), ("a.txt", b"A Cat.\n")], "a cat"),
        ([("a.txt", b"A Cat.\n"), ("a.json", b'{"url": "x"}')], "a cat"),
        *(([("a.txt", "A café".encode(encoding))], "a café") for encoding in ("utf-8-sig", "utf-16", "utf-32")),
        *(([("a.json", '{"caption": "A café"}'.encode(encoding))], "a café") for encoding in ("utf-8-sig", "utf-16")),
    ],
)
def test_caption_comes_from_json_or_text_in_any_marked_encoding_and_is_cleaned(members, answer, one, tools):
    good, bad = one(("README", b"x"), ("__meta__", b"x"), ("a.PNG", None), *members)
    assert (list(good), bad) == (["a"], [])
    assert good["a"]["answer"] == answer
    assert good["a"]["image"].shape == (3, tools.size, tools.size)


@pytest.mark.parametrize(
    ("suffix", "kind"), [("webp", "WEBP"), ("avif", "AVIF"), ("jfif", "JPEG"), ("jp2", "JPEG2000")]
)
def test_images_of_rarer_kinds_and_names_are_read(one, tools, suffix, kind):
    members = [
        (f"caf\udce9.{suffix}", tools.picture(kind=kind)),
        ("caf\udce9.json", b'{"best": "A cat", "caption": 5}'),
    ]
    good, bad = one(*members, caption_field="best")
    assert (list(good), bad) == (["caf\\udce9"], [])


BAD = {
    "no image": ([("a.json", b'{"caption": "A."}')], "one.tar/a: no image; the sample has json"),
    "no caption": ([("a.png", None)], "one.tar/a: no caption"),
    "empty caption": ([("a.png", None), ("a.json", b'{"caption": " "}')], "one.tar/a: the caption is empty"),
    "only dots": ([("a.png", None), ("a.txt", b"...")], "one.tar/a: nothing is left of the caption"),
    "number": ([("a.png", None), ("a.json", b'{"caption": 5}')], "one.tar/a: the caption must be text"),
    "wrong json": ([("a.png", None), ("a.json", b"{"), ("a.txt", b"x")], "one.tar/a.json: "),
    "json list": ([("a.png", None), ("a.json", b"[]")], "one.tar/a.json: must be an object"),
    "latin text": ([("a.png", None), ("a.txt", b"caf\xe9")], "one.tar/a.txt: not UTF-8 text (byte 0xe9 in line 1)"),
    "cut UTF-16": ([("a.png", None), ("a.txt", b"\xff\xfea")], "one.tar/a.txt: not UTF-16 text"),
    "unmarked UTF-16": (
        [("a.png", None), ("a.txt", "кот".encode("utf-16-le"))],
        "one.tar/a: the caption cannot be read",
    ),
    "latin json": ([("a.png", None), ("a.json", b'{"caption": "\xe9"}')], "one.tar/a.json: not UTF-8 text"),
    "twice": ([("a.png", None), ("a.json", b'{"caption": "a", "caption": "b"}')], "one.tar/a.json: the field"),
    "a name twice": ([("000000001.png", None)], "duplicate"),
    "no picture": ([("a.jpg", b"hello"), ("a.txt", b"x")], "one.tar/a.jpg: not an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_is_one_and_its_neighbours_are_read(kind, files, one):
    members, complaint = BAD[kind]
    good, bad = one(*files.pair(1), *members, *files.pair(2))
    assert list(good) == ["000000001", "000000002"]
    assert [complaint in reason for reason in bad] == [True]


THREE_SAMPLES = 3 * 4 * 512  # two members of two blocks each


@pytest.mark.parametrize(
    ("start", "content"),
    [(THREE_SAMPLES, None), (THREE_SAMPLES + 20, None), (THREE_SAMPLES + 532, None), (THREE_SAMPLES, b"?" * 512)],
    ids=["cut at a boundary", "cut in a header", "cut in an image", "damaged header"],
)
def test_damaged_shard_gives_what_comes_before_and_one_bad_record(start, content, files, tools):
    path = files.shard("cut.tar", range(5))
    with path.open("r+b") as tar:
        tar.seek(start)
        tar.write(content) if content else tar.truncate()
    good, bad = tools.read(files.dataset("image_caption_shards", storage=str(path)))
    assert list(good) == ["000000000", "000000001", "000000002"]
    assert len(bad) == 1
    assert "cut.tar: the shard is cut off" in bad[0]
    assert "after 3 samples" in bad[0]


@pytest.mark.parametrize(
    "content",
    [None, b"", b"not a tar at all" * 100, bytes(10240)],
    ids=["missing", "empty file", "no tar", "tar of nothing"],
)
@pytest.mark.parametrize("readers", [1, 5])
def test_unreadable_shard_is_one_bad_record_for_any_number_of_readers(content, readers, files, tools):
    if content is not None:
        (files.folder / "s-1.tar").write_bytes(content)
    for number, keys in ((0, range(2)), (2, range(2, 5))):
        files.shard(f"s-{number}.tar", keys)
    good, bad = tools.read(files.dataset("image_caption_shards", storage=f"{files.folder}/s-{{0..2}}.tar"), readers)
    assert (len(good), ["s-1.tar: the shard" in reason for reason in bad]) == (5, [True])


def test_urls_and_compressed_tars_are_read_and_a_failing_command_is_a_bad_record(files, tools):
    path = files.shard("a.tar", range(3))
    packed = path.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for url in (f"pipe:cat {path}", f"file:{path}", str(packed)):
        good, bad = tools.read(files.dataset("image_caption_shards", storage=url))
        assert (len(good), bad) == (3, [])
    gone = f"pipe:cat {files.folder}/gone.tar 2>/dev/null"
    good, bad = tools.read(files.dataset("image_caption_shards", storage=gone))
    assert (good, len(bad)) == ({}, 1)


def test_split_has_shards_of_its_own(files, tools):
    train, val = files.shard("train.tar", range(2)), files.shard("val.tar", range(2, 3))
    info = {"storage": str(train), "val_storage": str(val)}
    good, _ = tools.read(files.dataset("image_caption_shards", split="val", **info))
    assert list(good) == ["000000002"]
    with pytest.raises(ConfigError, match="set build_info.test_storage"):
        files.dataset("image_caption_shards", split="test", **info)
