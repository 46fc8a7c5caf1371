"""Annotation files of every kind give the same records, and no row takes in another; faults have their place."""

import csv
import json
import pickle
from itertools import product
from pathlib import Path

import pandas
import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.datasets.image_caption_json import Records

CASES = Path(__file__).parents[1] / "data/cases"


@pytest.fixture
def read(tmp_path):
    """Records, or the fault, of each record of a file."""

    def read(name, content):
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        records, rows = pickle.loads(pickle.dumps(Records(tmp_path / name))), []
        for index in range(len(records)):
            try:
                rows.append(records[index])
            except SampleError as error:
                rows.append(str(error).removeprefix(f"{tmp_path}/{name}, "))
        return rows

    return read


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 100\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("no_end.jsonl", '{"image_id": "1", "caption": "été"}\r\n \t{"image_id": "2", "caption": "b, c"}'),
        ("blank.jsonl", '{"image_id": "1", "caption": "été"}\n\n{"image_id": "2", "caption": "b, c"}\n'),
        ("list.json", '\r\n[\n{"image_id": "1", "caption": "été"} ,{"image_id":\r\n"2", "caption": "b, c"}\n]\n'),
        ("ascii.json", '[{"image_id": "1", "caption": "\\u00e9t\\u00e9"}, {"image_id": "2", "caption": "b, c"}]'),
        ("b.json", '{"annotations": [{"image_id": "1", "caption": "été"}, {"image_id": "2", "caption": "b, c"}]}'),
        ("d.csv", 'image_id,caption\n1,été\n2,"b, c"\n'),
        ("blank.csv", 'image_id, caption\n1, été\n\n  \n2, "b, c"\n'),
        ("nameless.csv", ',image_id,caption,\n0,1,été,\n1,2,"b, c",\n'),
        ("excel.csv", "sep=;\r\nimage_id;caption\r\n1;été\r\n2;b, c\r\n"),
        ("cr.csv", 'image_id,caption\r1,été\r2,"b, c"\r'),
        ("e.tsv", "image_id\tcaption\n1\tété\n2\tb, c\n"),
        ("crlf.tsv", "image_id\tcaption\r\n1\tété\r\n2\tb, c\r\n"),
        ("cr.tsv", "image_id\tcaption\r1\tété\r2\tb, c\r"),
    ],
)
def test_every_kind_of_file_gives_the_same_records(name, content, read):
    records = [{"image_id": "1", "caption": "été"}, {"image_id": "2", "caption": "b, c"}]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert read(name, content.encode(encoding)) == records, encoding


def test_wrong_line_of_jsonl_is_named_and_the_others_are_read(read):
    rows = read("a.jsonl", b'{"x": 1}\n\n{"x": \n{"x": "\xff"}\n[1]\n{"x": 2}\n')
    assert rows[0] == {"x": 1}
    assert [row.partition(":")[0] for row in rows[1:4]] == ["line 3", "line 4", "line 5"]
    assert rows[4] == {"x": 2}


def test_token_file_of_flickr_has_a_caption_a_line(read):
    rows = read("results_20130124.token", b'1.jpg#0\tA dog .\r\n1.jpg#1\tA "red" dog .\r\n\r\n2.jpg\tA cat .\r\n')
    assert rows[:2] == [{"image": "1.jpg", "caption": text} for text in ("A dog .", 'A "red" dog .')]
    assert rows[2].startswith("line 4: not a record of named fields: it has no image#number")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", '[{"x": 1},', "not JSON: .*line 1 column 11"),
        ("a.json", '[{"x": 1}\n{"x": 2}]', "not JSON: .*line 2 column 1"),
        ("a.json", '[{"x": 1}] {}', r"not JSON: Extra data: line 1 column 12.*\.jsonl"),
        ("a.json", "", "not JSON: .*line 1 column 1"),
        ("a.json", '{"images": []}', ".*under 'annotations'"),
        ("a.json", '[{"x": 1, "x": 2}]', ".*stands twice"),
        ("a.json", '"text"', "expected a list of records"),
        ("a.jsonl", '\n[\n{"x": 1}]', "a list, and not an object a line; JSON lists end in .json"),
        *((f"a.{kind}", POINTER, "a Git LFS pointer, not the file") for kind in ("json", "jsonl", "csv")),
        ("a.json", b"\x1f\x8b\x08\x00", "packed by gzip"),
        ("a.jsonl", b"PK\x03\x04", "a zip file"),
        ("a.csv", "\n\n", "the first line must name the fields"),
        ("a.xlsx", "", ".*annotations are read from .json"),
        ("a.csv", 'image,caption\n1,a\n2,"b\n3,c\n', "line 3: "),
        ("a.csv", 'image,caption\n1,"a\n2,"b"\n', "line 2: "),
        ("a.csv", 'image,caption\n1,"a \\"red\\" boat"\n', "line 2: "),
        ("a.tsv", 'image\tcaption\n1\t"a ""red"" boat"\n2\t"a" 12 record\n', "line 3: "),
        ("a.csv", "image,caption, caption\n1,a,b\n", "line 1: .*'caption'"),
        ("a.csv", b"image,caption\n1,caf\xe9\n", "not UTF-8 text .byte 0xe9 in line 2"),
        ("a.csv", "image,caption\n1,a\n".encode("utf-16-le"), "line 1: .*UTF-16"),
    ],
)
def test_file_that_is_wrong_as_a_whole_is_refused_by_name_and_line(name, content, complaint, read):
    with pytest.raises(ConfigError, match=f"{name}: {complaint}"):
        read(name, content)


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ","), ("a.csv", ";"), ("a.csv", "|")])
def test_what_pandas_writes_is_read_as_it_was(read, name, delimiter):
    captions = [
        *("A dog runs .", 'He said "hi", twice.', '"Open"', '" A man', "12'' and 12\"", "two\nlines", "tab\tand\nline"),
        *("", "é 🗼", "a;b|c", "one\ntwo, three", "a,b\nc,d", "in 1990,\n2 dogs, 3 cats", "x" * 200_000),
    ]
    frame = pandas.DataFrame({"image": [f"{n}.jpg" for n in range(len(captions))], "caption": captions})
    for quoting, index in product((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC), (True, False)):
        assert read(name, frame.to_csv(sep=delimiter, quoting=quoting, index=index)) == frame.to_dict("records")


def test_quotation_marks_of_a_file_that_quotes_nothing_are_text(read):
    captions = [record["caption"] for record in read("a.tsv", (CASES / "unquoted.tsv").read_bytes())]
    assert captions[1:3] == ['"Open" says the sign on the door .', '" A man in a hat stands by the road .']
    assert captions[6:8] == ['The 12" record plays .', '"The end .']
    text = 'image,caption\n1.jpg,A sign says "hi" .\n2.jpg,"A ""red"" boat, 12"""\n3.jpg,12" and 7"\n'
    assert [row["caption"] for row in read("a.csv", text)] == ['A sign says "hi" .', 'A "red" boat, 12"', '12" and 7"']


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pair.tsv", 'image\tcaption\n1.jpg\t" A man\n2.jpg\tdog\n3.jpg\tthe end"\n'),
        ("first.tsv", 'caption\timage\n" A man\t1.jpg\ndog\t2.jpg\nthe end"\t3.jpg\n'),
        ("bar.csv", 'image| caption\n1.jpg| " A man\n2.jpg| dog\n3.jpg| the end"\n'),
    ],
)
def test_quotation_marks_that_happen_to_pair_take_no_rows(read, name, text):
    captions = {row["image"]: row["caption"] for row in read(name, text)}
    assert captions == {"1.jpg": '" A man', "2.jpg": "dog", "3.jpg": 'the end"'}


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        ("image,caption\n1.jpg,a,b\n2.jpg,c\n", 2, "3 fields, not 2"),
        ("image,caption\n1.jpg\n2.jpg,c\n", 2, "1 fields, not 2"),
        ('image,caption\n0.jpg,"two\nlines"\n1.jpg,a,b\n2.jpg,c\n', 4, "3 fields, not 2"),
        ("image,caption,,\n1.jpg,a dog, running,\n2.jpg,c,,\n", 2, "a column without a name"),
        ('image,caption\n1.jpg,"a\n7.jpg,b"\n2.jpg,c\n', 2, "looks like a row"),
        ('caption,image\n"a,1.jpg\nb",7.jpg\nc,2.jpg\n', 2, "looks like a row"),
        ('image,caption\n1/a/x.jpg,"one, two\n\n1/b/y.PNG,two, three"\n2.jpg,c\n', 2, "looks like a row"),
        ('image_id,caption\n1,"a\n7,b"\n2.jpg,c\n', 2, "looks like a row"),
        ('url,caption\nhttp://x/1,"a\nhttp://x/7,b"\n2.jpg,c\n', 2, "looks like a row"),
        ('caption,image\n"A man said hi,cat.jpg\nA dog, small",dog.jpg\nc,2.jpg\n', 2, "looks like a row"),
    ],
)
def test_bad_row_is_named_by_its_line_and_the_next_one_is_read(text, line, fault, read):
    *_, bad, good = read("a.csv", text)
    assert set(good.values()) == {"2.jpg", "c"}
    assert bad.startswith(f"line {line}: ")
    assert fault in bad


# What others made: Karpathy, COCO

SENTENCES = [{"raw": "A man cooks.", "tokens": ["a", "man", "cooks"]}, {"raw": " A cook. \n"}]
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val2014", "filename": "COCO_val2014_391895.jpg", "cocoid": 391895, "imgid": 0, "split": "test"}
        | {"sentences": SENTENCES},
        {"filename": "1000092795.jpg", "imgid": 1, "split": "restval", "sentences": []},
    ],
}
COCO = {
    "images": [{"id": 42, "file_name": "000000000042.jpg"}],
    "annotations": [
        *({"image_id": 42, "id": 1, "caption": "A dog."}, {"image_id": 42, "id": 2, "caption": "An animal."}),
        *({"image_id": 43, "id": 3, "caption": "A cat."}, {"image_id": [42], "caption": "A."}),
    ],
}


def test_karpathy_image_is_a_record_with_its_captions_and_the_rest_of_val_is_for_training(read):
    first, second = read("dataset.json", KARPATHY)
    assert first == {
        "image_id": "391895",
        "image": "val2014/COCO_val2014_391895.jpg",
        "imgid": 0,
        "split": "test",
        "captions": ["A man cooks.", "A cook."],
        "caption": "A man cooks. A cook.",
    }
    assert (second["image_id"], second["image"], second["split"]) == ("1000092795", "1000092795.jpg", "train")


def test_coco_annotation_knows_the_file_of_its_image(read):
    images = [record.get("image") for record in read("captions.json", COCO)]
    assert images == ["000000000042.jpg", "000000000042.jpg", None, None]
    with pytest.raises(ConfigError, match="two images have the id 42: '000000000042.jpg' and 'other.jpg'"):
        read("captions.json", {**COCO, "images": [*COCO["images"], {"id": 42, "file_name": "other.jpg"}]})
