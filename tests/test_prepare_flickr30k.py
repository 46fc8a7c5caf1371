"""prepare_flickr30k.py on small CSV files of the real form."""

import csv
import json
from pathlib import Path

import pytest

CSV = "flickr_annotations_30k.csv"
TRAIN = "flickr30k_grounded_detail.json"
VAL, TEST = "flickr30k_grounded_detail_val.json", "flickr30k_grounded_detail_test.json"

FIVE = ["Two men, one with a hat, look on .", 'A sign says "Stop", in red.', "Third.", "Fourth.", "Fifth."]
ROWS = [  # captions, split, file
    (FIVE, "train", "1"),
    (["Ein Mädchen läuft – schnell.", "日本語", "c", "d", "e"], "train", "22"),
    (["Line\nbreak", "b", "c", "d", "e"], "val", "333"),
    (["Its file is missing."] * 5, "train", "4444"),
    (["a", "b", "c", "d", "e"], "test", "55555"),
]


@pytest.fixture(scope="module")
def command(load_script):
    """The script's `main`."""
    return load_script("prepare_flickr30k.py").main


@pytest.fixture
def root(tmp_path) -> Path:
    _write_csv(tmp_path)
    (tmp_path / "flickr30k-images").mkdir()
    for name in ("1", "22", "333", "55555"):
        (tmp_path / f"flickr30k-images/{name}.jpg").write_bytes(b"")
    return tmp_path


def _write_csv(root: Path, **second: str) -> Path:
    """The rows; `second`: other values of the second one."""
    with (root / CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["raw", "sentids", "split", "filename", "img_id"])
        writer.writeheader()
        for number, (captions, split, name) in enumerate(ROWS):
            values = {"raw": json.dumps(captions, ensure_ascii=False), "split": split, "filename": f"{name}.jpg"}
            values |= {"sentids": json.dumps(list(range(5 * number, 5 * number + 5))), "img_id": str(number)}
            writer.writerow(values | (second if number == 1 else {}))
    return root / CSV


def _entries(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))


def _ids(file: Path) -> list[str]:
    return [entry["image_id"] for entry in _entries(file)]


def test_captions_are_joined_and_splits_go_to_files_of_their_own(root, command, caplog):
    assert command(["--root", str(root)]) == 0
    assert _entries(root / TRAIN) == [
        {"image_id": "1", "grounded_caption": " ".join(FIVE)},
        {"image_id": "22", "grounded_caption": "Ein Mädchen läuft – schnell. 日本語 c d e"},
    ]
    assert _ids(root / VAL) == ["333"]
    assert _entries(root / TEST) == [
        {"image_id": "55555", "grounded_caption": "a b c d e", "captions": ["a", "b", "c", "d", "e"]}
    ]
    assert "1 images are missing and were left out: 4444.jpg" in caplog.text


def test_all_puts_every_split_into_the_training_file_and_a_blank_caption_leaves_no_second_blank(root, command, caplog):
    file = _write_csv(root, raw='["a", "", "c"]')
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert command(["--root", str(root), "--splits", "all"]) == 0
    assert [_ids(root / name) for name in (TRAIN, VAL, TEST)] == [["1", "22", "333", "55555"], ["333"], ["55555"]]
    assert all(list(entry) == ["image_id", "grounded_caption"] for entry in _entries(root / TRAIN))
    assert _entries(root / TRAIN)[1]["grounded_caption"] == "a c"
    assert "holds val and test" in caplog.text


def test_command_finds_flickr30k_in_the_working_folder_and_shows_a_bar(
    root, command, tmp_path_factory, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    root = root.rename("flickr30k")
    assert command([]) == 0
    assert "Flickr30k: 5 images" in capsys.readouterr().err
    assert _ids(root / TRAIN) == ["1", "22"]


FAULTS = [  # other values of the second row, or another file; what the error names
    ({"raw": '["a", "b"'}, "line 3, column raw: the captions are not JSON"),
    ({"raw": '{"a": 1}'}, "line 3, column raw: the captions must be a list"),
    ({"raw": '["a", 7]'}, "line 3, column raw: the captions must be a list"),
    ({"raw": "[]"}, "line 3, column raw: holds no caption"),
    ({"raw": '["", " "]'}, "line 3, column raw: holds no caption"),
    ({"raw": r'["a", "\ud83d"]'}, "line 3, column raw: caption 2 cannot be read"),
    ({"raw": r'["a", "\u0000"]'}, "line 3, column raw cannot be read"),
    ({"split": "validation"}, "line 3, column split: 'validation' is none of train, val, test"),
    ({"filename": ""}, "line 3, column filename: is empty"),
    ({"filename": "1.jpg"}, "line 3, column filename: 1.jpg stands in "),
    (b"sentids,split,img_id\n1,train,1\n", "no column raw, filename; it has sentids, split, img_id"),
    (b'raw,split,filename\n"[""a""]",train\n', "line 2: not a record of named fields"),
    (b'raw,split,filename\n"[""a""],train,1.jpg\n', "line 2: unexpected end of data; is a quotation mark"),
    (b"raw,split,filename,split\n", "line 1: two columns are called 'split'"),
    (b"", "the first line must name the fields"),
    ("raw,split,filename\nMädchen,train,1.jpg".encode("latin-1"), "not UTF-8 text (byte 0xe4 in line 2)"),
]


def test_what_is_wrong_is_named_by_file_line_and_column(root, command, capsys):
    def told():
        assert command(["--root", str(root)]) == 2
        assert not (root / TRAIN).exists()
        return capsys.readouterr().err

    for fault, message in FAULTS:
        if isinstance(fault, bytes):
            (root / CSV).write_bytes(fault)
        else:
            _write_csv(root, **fault)
        error = told()
        assert CSV in error
        assert message in error
    _write_csv(root)
    for image in (root / "flickr30k-images").iterdir():
        image.unlink()
    assert "flickr30k-images: holds none of the 5 images" in told()
    (root / "flickr30k-images").rmdir()
    assert "flickr30k-images: no such folder" in told()
    (root / CSV).unlink()
    assert "there is no such file; name its folder with --root" in told()


KAGGLE = """image_name| comment_number| comment
1.jpg| 0| Two " young " guys , one in a hat .
1.jpg| 1| " Stop " says a sign .
2199200615.jpg| 0| A dog .
2199200615.jpg| 4   A dog runs across the grass .
"""


def test_file_of_kaggle_is_read_with_its_row_that_lacks_a_bar_and_tells_no_splits(root, command, capsys):
    (root / CSV).unlink()
    (root / "results.csv").write_text(KAGGLE)
    (root / "flickr30k-images/2199200615.jpg").write_bytes(b"")
    assert command(["--root", str(root)]) == 2
    assert "results.csv: tells no splits; " in capsys.readouterr().err
    assert command(["--root", str(root), "--splits", "all"]) == 0
    assert _entries(root / TRAIN) == [
        {"image_id": "1", "grounded_caption": 'Two " young " guys , one in a hat . " Stop " says a sign .'},
        {"image_id": "2199200615", "grounded_caption": "A dog . A dog runs across the grass ."},
    ]
    assert not (root / VAL).exists()
