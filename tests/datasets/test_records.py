"""Annotation files of every kind, and the place of what is wrong in them."""

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.records import Records

RECORDS = [{"image_id": "1", "caption": "été"}, {"image_id": "2", "caption": "b, c"}]
FILES = {
    "a.json": '[{"image_id": "1", "caption": "été"}, {"image_id": "2", "caption": "b, c"}]',
    "b.json": '\ufeff{"annotations": [{"image_id": "1", "caption": "été"}, {"image_id": "2", "caption": "b, c"}]}',
    "c.jsonl": '{"image_id": "1", "caption": "été"}\n\n{"image_id": "2", "caption": "b, c"}\n',
    "d.csv": 'image_id,caption\n1,été\n2,"b, c"\n',
    "e.tsv": "image_id\tcaption\n1\tété\n2\tb, c\n",
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_records(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    records = Records(tmp_path / name)
    assert [records[index] for index in range(len(records))] == RECORDS


def test_wrong_line_of_jsonl_is_named_and_the_others_are_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"x": 1}\n\n{"x": \n{"x": "\xff"}\n[1]\n{"x": 2}\n')
    records = Records(file)
    assert (records[0], records[4]) == ({"x": 1}, {"x": 2})
    for index, line in ((1, 3), (2, 4), (3, 5)):
        with pytest.raises(SampleError, match=f"a.jsonl, line {line}: not"):
            records[index]


def test_line_of_csv_counts_lines_inside_quotes(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('id,caption\n1,"two\nlines"\n2,a,b\n3,c\n')
    records = Records(file)
    assert records[0]["caption"] == "two\nlines"
    with pytest.raises(SampleError, match="line 4: not a record"):
        records[1]
    assert records[2] == {"id": "3", "caption": "c"}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", '[{"x": 1},', "a.json: not JSON: .*line 1 column 11"),
        ("a.json", '{"images": []}', "under 'annotations'"),
        ("a.json", '"text"', "expected a list of records"),
        ("a.csv", "", "the first line must name the fields"),
        ("a.xlsx", "", "annotations are read from .json"),
    ],
)
def test_file_that_is_wrong_as_a_whole_is_refused(name, content, complaint, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        Records(tmp_path / name)
