"""CSV and TSV as people have them: no quotation mark takes a word or a row with it, and bad rows have their line."""

import csv
import io
from pathlib import Path

import pandas
import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.datasets.image_caption_json import Records

CASES = Path(__file__).parents[1] / "data/cases"
CAPTIONS = [
    "A dog runs .",
    'He said "hi", twice.',
    '"Open"',
    '" A man',
    "12'' and 12\"",
    "two\nlines",
    "tab\tand\nline",
    "",
    "é 🗼",
    "a;b|c",
]


@pytest.fixture
def read(tmp_path):
    """Records, or the fault, of each row of a file."""

    def read(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        records, rows = Records(tmp_path / name), []
        for index in range(len(records)):
            try:
                rows.append(records[index])
            except SampleError as error:
                rows.append(str(error).removeprefix(f"{tmp_path}/{name}, "))
        return rows

    return read


def test_unquoted_tsv_is_read_line_by_line():
    records = Records(CASES / "unquoted.tsv")
    assert [records[index]["caption"] for index in range(len(records))] == [
        "A dog runs .",
        '"Open" says the sign on the door .',
        '" A man in a hat stands by the road .',
        "Two men stand .",
        "A cat .",
        "A red boat .",
        'The 12" record plays .',
        '"The end .',
        "A bird .",
        "A tree .",
    ]


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ","), ("a.csv", ";"), ("a.csv", "|")])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("index", [True, False])
def test_what_pandas_writes_is_read_as_it_was(read, name, delimiter, quoting, index):
    frame = pandas.DataFrame({"image": [f"{n}.jpg" for n in range(len(CAPTIONS))], "caption": CAPTIONS})
    text = frame.to_csv(sep=delimiter, quoting=quoting, index=index)
    assert read(name, text) == frame.to_dict("records")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_line_ends_and_marked_encodings_change_nothing(read, end, encoding, name, delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows([["image", "caption"], ["1.jpg", 'é "x", y']])
    assert read(name, out.getvalue().encode(encoding)) == [{"image": "1.jpg", "caption": 'é "x", y'}]


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


WHOLE = {
    "unclosed": ("a.csv", 'image,caption\n1,a\n2,"b\n3,c\n', "line 3: the quotation mark that opens a field is never"),
    "closed later": ("a.csv", 'image,caption\n1,"a\n2,"b"\n', "line 2: .*in line 3"),
    "backslash": ("a.csv", 'image,caption\n1,"a \\"red\\" boat"\n', "line 2: "),
    "mixed": ("a.tsv", 'image\tcaption\n1\t"a ""red"" boat"\n2\ta 12" record\n', "line 3: .*line 2 is quoted"),
    "mixed names": ("a.tsv", '"image"\t"caption"\n1\ta 12" record\n', "line 2: .*line 1 is quoted"),
    "mixed lines": ("a.tsv", 'image\tcaption\n1\t"two\nlines"\n2\ta 12" record\n', "line 4: .*line 3 is quoted"),
    "either": ("a.tsv", 'image\tcaption\ncat\t"a\ndog\tb"\n', "line 2: a quotation mark here may be"),
    "doubled": ("a.csv", "image,caption, caption\n1,a,b\n", "line 1: two columns are called 'caption'"),
    "nameless": ("a.csv", ",,\n1,a,b\n", "the first line must name the fields"),
    "blank": ("a.csv", "\n\n", "the first line must name the fields"),
    "latin": ("a.csv", b"image,caption\n1,caf\xe9\n", "not UTF-8 text .byte 0xe9 in line 2"),
    "unmarked": ("a.csv", "image,caption\n1,a\n".encode("utf-16-le"), "line 1: .*UTF-16"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_file_whose_rows_cannot_be_told_is_refused_by_line(kind, read):
    name, content, complaint = WHOLE[kind]
    with pytest.raises(ConfigError, match=f"{name}: {complaint}"):
        read(name, content)


def test_unclosed_quotation_mark_of_a_csv_is_named():
    with pytest.raises(ConfigError, match=r"unclosed.csv: line 2: .*in line 5"):
        Records(CASES / "unclosed.csv")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("image,caption\n1.jpg,a,b\n2.jpg,c\n", "line 2: .*3 fields, not 2"),
        ("image,caption\n1.jpg\n2.jpg,c\n", "line 2: .*1 fields, not 2"),
        ("image,caption,,\n1.jpg,a dog, running,\n2.jpg,c,,\n", "line 2: .*column 3 holds ' running' and has no name"),
        ('image,caption\n1.jpg,"a\n7.jpg,b"\n2.jpg,c\n', "line 2: .*takes in line 3, which looks like a row"),
        ('caption,image\n"a,1.jpg\nb",7.jpg\nc,2.jpg\n', "line 2: .*looks like a row"),
        ('image,caption\n9f3a.jpg,"A man said hi\nc01b.jpg,a tv of 40"\n2.jpg,c\n', "line 2: .*takes in line 3"),
        ('image,caption\n1/a/x.jpg,"one, two\n\n1/b/y.PNG,two, three"\n2.jpg,c\n', "line 2: .*takes in line 4"),
        ('caption,image\n"A man said hi,cat.jpg\nA dog, small",dog.jpg\nc,2.jpg\n', "line 2: .*takes in line 2"),
        ('image,caption\nhttp://a.b/x,"one\nhttps://c.d/y?z=1,two"\n2.jpg,c\n', "line 2: .*takes in line 3"),
        ('image,caption\n9f3a,"A man said hi\nc01b,a tv of 40"\n2.jpg,c\n', "line 2: .*takes in line 3"),
        ('image,caption\n9f3a,"A man\n1234,a tv, two"\n2.jpg,c\n', "line 2: .*takes in line 3"),
        ('image,caption\nbeach,"A man said hi\ncat,a tv of 40"\n2.jpg,c\n', "line 2: .*takes in line 3"),
        ('image,caption\n1.jpg, "Open" says the sign\n2.jpg,c\n', "line 2: .*blanks before the quotation mark"),
    ],
)
def test_bad_row_is_named_by_its_line_and_the_next_one_is_read(text, fault, read, tmp_path):
    _, good = read("a.csv", text)
    assert good == {"image": "2.jpg", "caption": "c"}
    with pytest.raises(SampleError, match=fault):
        Records(tmp_path / "a.csv")[0]


def test_row_inside_a_field_between_others_is_found(read):
    fault, good = read("a.csv", 'image,caption,split\na.jpg,"x dog,train\nbeach.jpg,a cat",val\nb.jpg,c,val\n')
    assert "line 2: " in fault
    assert "takes in line 3" in fault
    assert good == {"image": "b.jpg", "caption": "c", "split": "val"}


@pytest.mark.parametrize(
    "caption",
    [
        "one\ntwo, three",
        "a,b\nc,d",
        "one\ntwo,three",
        "in 1990,\n2 dogs, 3 cats",
        "a, val\nb, val",
        "one,val\ntwo",
        "1,2\n3,4",
    ],
)
@pytest.mark.parametrize("order", [("image", "caption", "split"), ("split", "caption", "image"), ("caption", "image")])
def test_lines_of_a_caption_that_name_no_image_are_no_rows(read, caption, order):
    frame = pandas.DataFrame({"image": ["1.jpg", "2.jpg"], "caption": [caption, "x"], "split": ["val", ""]})[[*order]]
    assert read("a.csv", frame.to_csv(index=False)) == frame.to_dict("records")


def test_quotation_marks_inside_a_field_that_begins_with_none_are_text(read):
    text = 'image,caption\n1.jpg,A sign says "hi" .\n2.jpg,"A ""red"" boat, 12"""\n3.jpg,12" and 7"\n'
    assert [row["caption"] for row in read("a.csv", text)] == ['A sign says "hi" .', 'A "red" boat, 12"', '12" and 7"']


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_by_which_excel_tells_the_delimiter_is_no_row(read, tmp_path, end):
    rows = read("a.csv", end.join(["sep=;", "image;caption", "1.jpg;a, b", "2.jpg"]))
    assert rows[0] == {"image": "1.jpg", "caption": "a, b"}
    assert rows[1].startswith("line 4: ")


def test_columns_without_a_name_and_blank_lines_are_passed_over(read):
    assert read("a.csv", ",image,caption,\n0,1.jpg,a,\n\n  \n1,2.jpg,b,\n") == [
        {"image": "1.jpg", "caption": "a"},
        {"image": "2.jpg", "caption": "b"},
    ]


def test_field_may_be_longer_than_what_python_takes_by_default(read):
    (row,) = read("a.csv", f"image,caption\n1.jpg,{'x' * 200_000}\n")
    assert len(row["caption"]) == 200_000


def test_blanks_after_the_delimiters_of_the_names_belong_to_the_delimiter(read):
    assert read("a.csv", 'image, caption\n1.jpg, "a, b"\n2.jpg,  c\n') == [
        {"image": "1.jpg", "caption": "a, b"},
        {"image": "2.jpg", "caption": "c"},
    ]
