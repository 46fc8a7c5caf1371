"""Annotation files of every kind, and the place of what is wrong in them."""

import os
import pickle
from pathlib import Path

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.datasets.image_caption_json import Records

RECORDS = [{"image_id": "1", "caption": "été"}, {"image_id": "2", "caption": "b, c"}]
FILES = {
    "no_end.jsonl": '{"image_id": "1", "caption": "été"}\r\n \t{"image_id": "2", "caption": "b, c"}',
    "list.json": '\ufeff\r\n[\r\n{"image_id": "1", "caption": "été"} ,{"image_id":\r\n"2", "caption": "b, c"}\n]\n',
    "ascii.json": '[{"image_id": "1", "caption": "\\u00e9t\\u00e9"}, {"image_id": "2", "caption": "b, c"}]',
    "a.json": '[{"image_id": "1", "caption": "été"}, {"image_id": "2", "caption": "b, c"}]',
    "b.json": '\ufeff{"annotations": [{"image_id": "1", "caption": "été"}, {"image_id": "2", "caption": "b, c"}]}',
    "c.jsonl": '{"image_id": "1", "caption": "été"}\n\n{"image_id": "2", "caption": "b, c"}\n',
    "d.csv": 'image_id,caption\n1,été\n2,"b, c"\n',
    "e.tsv": "image_id\tcaption\n1\tété\n2\tb, c\n",
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_records(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name].encode())
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
        ("a.json", '[{"x": 1},]', "a.json: not JSON: .*line 1 column 11"),
        ("a.json", '[{"x": 1}\n{"x": 2}]', "a.json: not JSON: .*line 2 column 1"),
        ("a.json", '[{"x": 1}', "a.json: not JSON: .*line 1 column 10"),
        ("a.json", '[{"x": 1}] {}', "a.json: not JSON: Extra data: line 1 column 12"),
        ("a.json", "[", "a.json: not JSON: .*line 1 column 2"),
        ("a.json", "", "a.json: not JSON: .*line 1 column 1"),
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


def test_empty_list_has_no_records(tmp_path):
    (tmp_path / "a.json").write_text(" [ ] ")
    assert len(Records(tmp_path / "a.json")) == 0


def anonymous_memory() -> int:
    """Bytes of this process that no other can share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_text_of_json_stays_in_its_file(name, tmp_path):
    line = f'{{"caption": "{"word " * 2000}"}}'
    lines = [line] * 3000  # 30 MB
    (tmp_path / name).write_text("\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]")
    Records(tmp_path / name)  # what Python keeps for itself
    before = anonymous_memory()
    records = Records(tmp_path / name)
    assert len(records) == 3000
    assert anonymous_memory() - before < 3_000_000


@pytest.mark.parametrize("name", FILES)
def test_records_go_to_another_process_by_pickling(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name].encode())
    records = pickle.loads(pickle.dumps(Records(tmp_path / name)))
    assert [records[index] for index in range(len(records))] == RECORDS


def test_file_that_was_changed_while_it_was_used_is_named_as_changed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"x": 1}\n{"x": 2}\n')
    records = Records(file)
    with file.open("r+") as text:  # in place, as a careless program writes
        text.write('{"y": 1000}')
        text.truncate()
    os.utime(file, ns=(0, 0))
    with pytest.raises(SampleError, match="line 2: not JSON .*changed after it was opened"):
        records[1]


def test_file_that_was_replaced_is_read_as_it_was(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"x": 1}\n{"x": 2}\n')
    records = Records(file)
    (tmp_path / "new").write_text("{}\n")
    (tmp_path / "new").replace(file)
    assert records[1] == {"x": 2}
