"""Parquet files and `save_to_disk` folders give the samples of the JSON file with the same content, in its order."""

import json
import pickle

import pyarrow as pa
import pytest
from pyarrow import parquet

from minigpt4.common.errors import ConfigError
from minigpt4.datasets import TrainSource

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COUNT = 11


@pytest.fixture
def cats(files):
    """JSON of 11 captions, the dataset of it, and columns with the same content; image 3 is bad, caption 5 is empty."""
    images = files.images(range(COUNT))
    (images / "3.jpg").write_bytes(b"no image")
    texts = ["" if key == 5 else f"Cat {key}." for key in range(COUNT)]
    json_file = files.json("cats.json", [{"image_id": str(n), "caption": text} for n, text in enumerate(texts)])
    contents = [(images / f"{key}.jpg").read_bytes() for key in range(COUNT)]
    columns = {"image_id": [str(key) for key in range(COUNT)], "caption": texts}
    local = files.dataset("image_caption_json", "cats", ann_path=str(json_file), image_path=str(images))
    return local, columns, contents


FORMS = {
    "struct": lambda contents: pa.array([{"bytes": content, "path": None} for content in contents], STRUCT),
    "bytes": lambda contents: pa.array(contents, pa.binary()),
    "large bytes": lambda contents: pa.array(contents, pa.large_binary()),
    "list": lambda contents: pa.array([[content] for content in contents], pa.list_(pa.binary())),
    "paths": lambda contents: pa.array([f"{key}.jpg" for key in range(len(contents))]),
    "struct of paths": lambda contents: pa.array(
        [{"bytes": None, "path": f"{key}.jpg"} for key in range(len(contents))], STRUCT
    ),
}


def write(files, kind, table):
    """The table as one file, as two of them, or as `datasets` saves it; the value of `ann_path`."""
    folder = files.folder / "columns"
    folder.mkdir()
    if kind == "saved":
        import datasets

        datasets.Dataset(table).save_to_disk(str(folder), num_shards=2)
        return str(folder)
    if kind == "file":
        parquet.write_table(table, folder / "one.parquet", row_group_size=3)
        return str(folder / "one.parquet")
    for number, part in enumerate((table.slice(0, 4), table.slice(4))):
        parquet.write_table(part, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=3)
    (folder / "._train-00000-of-00002.parquet").write_bytes(b"\0\5\x16\7")  # as macOS does
    return {
        "folder": str(folder),
        "pattern": f"{folder}/train-*.parquet",
        "braces": f"{folder}/train-0000{{0,1}}-of-00002.parquet",
    }[kind]


@pytest.mark.parametrize(
    ("form", "kind", "workers"),
    [
        *((form, "file", 0) for form in FORMS if form != "list"),
        *(("struct", kind, 0) for kind in ("folder", "pattern", "braces")),
        ("struct", "saved", 2),
        *((form, "saved", 0) for form in ("bytes", "paths")),
    ],
)
def test_batches_bad_samples_and_resume_are_those_of_the_json_file(form, kind, workers, cats, files, loaders, tools):
    local, columns, contents = cats
    path = write(files, kind, pa.table({**columns, "image": FORMS[form](contents)}))
    info = {"image_path": str(files.folder / "images")} if "paths" in form else {}
    dataset = files.dataset("image_caption_json", "cats", ann_path=path, **info)
    keys = {"num_workers": workers, "rank": 1, "world_size": 2}
    wanted, loader = (loaders.train(TrainSource(one, 2), **keys) for one in (local, dataset))
    batches = tools.take(wanted, 12)
    assert all(map(tools.same, tools.take(loader, 5), batches))
    resumed = loaders.train(TrainSource(pickle.loads(pickle.dumps(dataset)), 2), **keys)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert all(map(tools.same, tools.take(resumed, 7), batches[5:]))
    assert resumed.state_dict() == wanted.state_dict()
    assert wanted.state_dict()["counts"]["cats/train"][1] > 2


def test_storage_names_such_files_too_and_places_count_rows_of_a_file(cats, files, tools):
    _, columns, contents = cats
    path = write(files, "folder", pa.table({**columns, "image": FORMS["struct"](contents)}))
    dataset = files.dataset("image_caption_json", "cats", storage=path)
    assert [error.removeprefix(f"{path}/").partition("; ")[0][:48] for error in tools.read(dataset)[1]] == [
        "train-00000-of-00002.parquet, row 4: not an imag",
        "train-00001-of-00002.parquet, row 2: the caption",
    ]


def talk(number, places="<image>"):
    return [
        {"from": "human", "value": f"{places} Which?"},
        {"from": "gpt", "value": f"Number {number}, " * number + "."},
    ]


@pytest.mark.parametrize("kind", ["file", "saved"])
@pytest.mark.parametrize("form", ["list", "struct list", "old sequence"])
def test_conversations_with_some_images_or_none(form, kind, files, loaders, tools):
    folder = files.images("abc")
    names = [["a"], [], ["b", "c"], None, ["c"]] * 3
    turns = [talk(n + 1, "<image>" * len(own or [])) for n, own in enumerate(names)]
    records = [
        {"id": str(n), **({"image": [f"{name}.jpg" for name in own]} if own else {}), "conversations": turns[n]}
        for n, own in enumerate(names)
    ]
    info = {"id_field": "id", "image_path": str(folder)}
    wanted = files.dataset("llava_conversations", "talks", ann_path=str(files.json("t.json", records)), **info)

    def content(name):
        content = (folder / f"{name}.jpg").read_bytes()
        return {"bytes": content, "path": None} if form == "struct list" else content

    cells = [None if own is None else [content(name) for name in own] for own in names]
    told = [{key: [turn[key] for turn in own] for key in ("from", "value")} for own in turns]
    table = pa.table(
        {
            "id": [record["id"] for record in records],
            "talk": told if form == "old sequence" else turns,
            "pictures": pa.array(cells, pa.list_(STRUCT if form == "struct list" else pa.binary())),
        }
    )
    info = {"id_field": "id", "image_field": "pictures", "conversation_field": "talk"}
    dataset = files.dataset("llava_conversations", "talks", ann_path=write(files, kind, table), **info)
    assert dataset.modality_lengths().tolist() == wanted.modality_lengths().tolist()
    sources = [TrainSource(one, 2, group_by_modality_length=True) for one in (wanted, dataset)]
    first, second = (tools.take(loaders.train(source), 12) for source in sources)
    assert all(map(tools.same, first, second))


@pytest.mark.parametrize(
    ("builder", "info", "complaint"),
    [
        (
            "image_caption_json",
            {"caption_field": "text"},
            "caption_field: .* no column 'text'; its columns are caption, image",
        ),
        ("image_caption_json", {"image_field": "photo"}, "image_field: .* no column 'photo'; its columns are caption"),
        ("image_caption_json", {"conversation_field": "talk"}, "conversation_field: .* no column 'talk'"),
        ("llava_conversations", {}, "conversation_field: .* no column 'conversations'"),
        ("llava_conversations", {"conversation_field": "caption", "image_field": "i"}, "image_field: .* no column 'i'"),
    ],
)
def test_missing_column_is_named_with_those_that_are_there(builder, info, complaint, cats, files):
    _, columns, contents = cats
    path = write(files, "file", pa.table({**columns, "image": FORMS["struct"](contents)}))
    with pytest.raises(ConfigError, match=f"datasets.cats: build_info.{complaint}"):
        files.dataset(builder, "cats", ann_path=path, **info)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 100\n"


def _write(*names):
    return lambda folder, table: [parquet.write_table(table, folder / f"{name}.parquet") for name in names]


def _saved_splits(folder, table):
    import datasets

    datasets.DatasetDict(train=datasets.Dataset(table), test=datasets.Dataset(table)).save_to_disk(str(folder))


def _cut(folder, table):
    parquet.write_table(table, folder / "a.parquet")
    (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-20])


def _others(folder, table):
    parquet.write_table(table, folder / "a.parquet")
    parquet.write_table(table.rename_columns(["caption", "photo"]), folder / "b.parquet")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            _write("test-00000-of-00001", "train-00000-of-00001"),
            "splits; name one, such as .*/train-\\*.parquet",
        ),
        (_saved_splits, "holds several splits; name one of them: .*/test, .*/train"),
        (_cut, "a.parquet: cannot be read"),
        (_others, "do not have the same columns"),
        (lambda folder, table: None, "has no .parquet or .arrow files; its folders: none"),
        (lambda folder, table: (folder / "data").mkdir(), "its folders: .*columns/data"),
        (lambda folder, _: (folder / "a.parquet").write_bytes(POINTER), "a.parquet: cannot be read: a Git LFS pointer"),
        (lambda folder, table: _write("a")(folder, table.slice(1)), "columns: has no rows"),
        (lambda folder, table: (folder / "state.json").write_text("{}"), "state.json: cannot be read"),
    ],
)
def test_folder_that_cannot_be_read_is_refused_with_the_reason(make, complaint, files):
    folder = files.folder / "columns"
    folder.mkdir()
    make(folder, pa.table({"caption": ["A cat."], "image": [b"x"]}))
    with pytest.raises(ConfigError, match=complaint):
        files.dataset("image_caption_json", ann_path=str(folder))


def test_damaged_row_group_costs_its_own_rows(cats, files, tools):
    _, columns, contents = cats
    path = write(files, "file", pa.table({**columns, "image": FORMS["struct"](contents)}))
    chunk = parquet.ParquetFile(path).metadata.row_group(1).column(2)
    assert chunk.path_in_schema == "image.bytes"
    with open(path, "r+b") as file:  # noqa: PTH123
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(bytes(chunk.total_compressed_size))
    dataset = files.dataset("image_caption_json", ann_path=path)
    good, bad = tools.read(dataset)
    assert list(map(int, good)) == [0, 1, 2, *range(6, COUNT)]
    assert "one.parquet, row 5" in bad[1]
