"""Records in columns: Parquet files, and the Arrow files of a folder that `datasets` wrote with `save_to_disk`.

Texts are at hand, of Parquet in memory, of Arrow files mapped. Images stay where they are: one of an Arrow file is read
alone, one of a Parquet file with its row group, of which the last one is held.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.binding import expand_braces, matching_paths
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.remote import RemoteFile, file_system, is_remote, local_copy, retried, suffix_of
from minigpt4.common.utils import install_command, wrapped

PARQUET, ARROW = ".parquet", ".arrow"
STATE, SPLITS = "state.json", "dataset_dict.json"
"""Of `save_to_disk`: which files hold the rows of a dataset; the names of several splits."""
_OF_SPLIT = re.compile(r"(.+)-\d+-of-\d+")
"""How `datasets` names the files of a split."""


@dataclass(frozen=True)
class StoredImage:
    """An image in a table."""

    name: str
    """For errors: file and row."""
    read: Callable[[], bytes | str]
    """Its bytes, or the path that stands in their place; SampleError if there is neither."""


@dataclass(frozen=True)
class _Part:
    """An Arrow file, or a row group of a Parquet file."""

    file: str
    source: str
    """The file, or its copy here."""
    rows: int
    first: int = 0
    """Its first row in the file."""
    group: int = 0
    metadata: Any = None
    """Of a Parquet file."""
    size: int | None = None
    """Bytes of a Parquet file at an address."""
    table: Any = None
    """Of an Arrow file, mapped."""

    def column(self, name: str) -> Any:
        """A column with all of its bytes."""
        if self.table is not None:
            return self.table[name]
        file = _parquet(self.source, self.size, self.metadata)
        return file.read_row_group(self.group, columns=[name], use_threads=False)[name]


class ColumnRecords:
    """Rows by index, as `Records` has those of a text file; a record has the fields that are not null.

    Where `image_field` holds images, it is a `StoredImage` or a list of them, else what stands there, such as a path.

    Args:
        file: a file, a folder of them, a pattern with `*` or braces, a folder of `save_to_disk`, or such an address.
        cache: folder for copies of files at addresses.

    ConfigError if a file cannot be read, or files differ in their columns.
    """

    is_table = False

    def __init__(self, file: str | Path, image_field: str, cache: str | None = None) -> None:
        try:
            import pyarrow
        except ImportError as error:
            raise ConfigError(f"{file}: Parquet and Arrow files need pyarrow: {install_command('parquet')}") from error
        self.file, self._image, self._cache = file, image_field, cache
        self._parts: list[_Part] = []
        self.images: dict[str, bool] = {}
        """Columns that hold images; whether as lists of them."""
        self.columns: set[str] = set()
        tables, counts = [], []
        for name in _files(str(file)):
            with errors_as(ConfigError, f"{name}: cannot be read"):
                for part, texts, count in self._opened(name):
                    self._parts.append(part)
                    tables.append(texts)
                    counts.append(count)
        if not sum(map(len, counts)):
            raise ConfigError(f"{file}: has no rows")
        with errors_as(ConfigError, f"{file}: its columns are not of the same types in all files"):
            self._texts = pyarrow.concat_tables(tables)
        self._counts = np.concatenate(counts)
        self._ends = np.cumsum([part.rows for part in self._parts])
        self._last: tuple[int, Any] = (-1, None)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Opened anew by a process that was not forked."""
        return type(self), (self.file, self._image, self._cache)

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record; SampleError that names its place when a text of it is damaged."""
        where, count = self.where(index), int(self._counts[index])
        with errors_as(SampleError, where):
            cells = {name: self._texts[name][index] for name in self._texts.column_names}
            record = {name: _plain(cell.as_py()) for name, cell in cells.items() if cell.is_valid}
        if count:
            several = self.images[self._image]
            names = [f"{where}, image {number}" for number in range(1, count + 1)] if several else [where]
            images = [StoredImage(name, partial(self._content, index, n)) for n, name in enumerate(names)]
            record[self._image] = images if several else images[0]
        return record

    def where(self, index: int) -> str:
        """The place of a record, such as `birds.parquet, row 12`; rows of a file count from 1."""
        number, row = self._place(index)
        part = self._parts[number]
        return f"{part.file}, row {part.first + row + 1}"

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the part with a record, and the row in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + self._parts[number].rows

    def _content(self, index: int, place: int) -> bytes | str:
        number, row = self._place(index)
        with errors_as(SampleError, self.where(index)):
            if self._last[0] != number:
                self._last = number, self._parts[number].column(self._image)
            value = self._last[1][row]
            value = (value[place] if self.images[self._image] else value).as_py()
            if isinstance(value, dict):
                value = value["bytes"] if value["bytes"] is not None else value.get("path")
            if value is None:
                raise SampleError(f"{self.where(index)}: the image in {self._image!r} is null")
            return value

    def _opened(self, name: str) -> Iterator[tuple[_Part, Any, np.ndarray]]:
        """The parts of a file, with the table of the texts and (rows,) int64, how many images each row has."""
        import pyarrow as pa

        source = str(local_copy(name, Path(self._cache))) if is_remote(name) and self._cache else name
        if suffix_of(name) == ARROW:
            if is_remote(source):
                raise ConfigError(f"{name}: Arrow files are mapped; set build_info.cache_dir for a copy here")
            file = pa.memory_map(source)
            is_stream = file.read_at(6, 0) != b"ARROW1"
            table = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(file).read_all()
            self._note(table.schema, name)
            counts = _counts(table[self._image]) if self._image in self.images else np.zeros(len(table), np.int64)
            yield _Part(name, source, len(table), table=table), table.drop_columns(list(self.images)), counts
            return
        if not is_remote(source):
            with Path(source).open("rb") as file:
                if what := wrapped(file.read(64)):
                    raise ValueError(what)
        size = RemoteFile(source).size if is_remote(source) else None
        file = _parquet(source, size)
        self._note(file.schema_arrow, name)
        texts = [column for column in file.schema_arrow.names if column not in self.images]
        # Without the bytes themselves, where something stands beside them.
        leaves = [leaf for leaf in map(file.schema.column, range(len(file.schema.names))) if _root(leaf) == self._image]
        light = [leaf.path for leaf in leaves if leaf.logical_type.type != "NONE"] or [self._image]
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            counts = np.zeros(rows, np.int64)
            if self._image in self.images:
                counts = _counts(file.read_row_group(group, columns=light, use_threads=False)[self._image])
            table = file.read_row_group(group, columns=texts, use_threads=False)
            yield _Part(name, source, rows, first, group, file.metadata, size), table, counts
            first += rows

    def _note(self, schema: Any, name: str) -> None:
        """Take the columns of the first file, and ConfigError for another one with others."""
        if not self._parts:
            self.images, self.columns = _image_columns(schema), set(schema.names)
        if _image_columns(schema) != self.images or set(schema.names) != self.columns:
            columns = f"{', '.join(schema.names)}, and those of {self._parts[0].file} {', '.join(sorted(self.columns))}"
            raise ConfigError(f"{self.file}: its files do not have the same columns; those of {name} are {columns}")


def _parquet(source: str, size: int | None, metadata: Any = None) -> Any:
    """pyarrow's ParquetFile; without threads of its own, for workers are forked."""
    from pyarrow.parquet import ParquetFile

    file = RemoteFile(source, size) if is_remote(source) else source
    return ParquetFile(file, metadata=metadata, memory_map=not is_remote(source), pre_buffer=False)


def _root(leaf: Any) -> str:
    return leaf.path.partition(".")[0]


def _image_columns(schema: Any) -> dict[str, bool]:
    """Columns of bytes, alone or as the `bytes` of what `datasets` calls an Image, and whether they are lists."""
    from pyarrow import types

    found = {}
    for field in schema:
        is_list = types.is_list(field.type) or types.is_large_list(field.type)
        kind = field.type.value_type if is_list else field.type
        if types.is_struct(kind) and (place := kind.get_field_index("bytes")) >= 0:
            kind = kind.field(place).type
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
            found[field.name] = is_list
    return found


def _counts(column: Any) -> np.ndarray:
    """How many images each row has, (rows,) int64."""
    from pyarrow import compute, types

    is_list = types.is_list(column.type) or types.is_large_list(column.type)
    counts = compute.fill_null(compute.list_value_length(column), 0) if is_list else compute.is_valid(column)
    return counts.to_numpy().astype(np.int64)


def _plain(value: Any) -> Any:
    """A list of structs also where it stands as a struct of lists, as older `datasets` wrote them."""
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value


def _files(file: str) -> Sequence[str]:
    """The files that a path or an address stands for, in their order; ConfigError for none, or for others."""
    if is_remote(file):
        names = [one for pattern in expand_braces(file) for one in _remote_files(pattern)]
    elif Path(file).is_dir():
        names = _files_of_folder(Path(file))
    else:
        names = [name for pattern in expand_braces(file) for name in matching_paths(pattern)]
    if other := next((name for name in names if suffix_of(name) not in (PARQUET, ARROW)), None):
        kinds = ".json, .jsonl, .csv, .tsv, .parquet, .arrow"
        raise ConfigError(f"{other}: unknown kind of file; annotations are read from {kinds} and folders")
    if not names and Path(file).is_dir():
        below = ", ".join(sorted(str(path) for path in Path(file).iterdir() if path.is_dir())) or "none"
        raise ConfigError(f"{file}: has no {PARQUET} or {ARROW} files; its folders: {below}")
    if not names:
        raise ConfigError(f"{file}: there is no such file, nor {PARQUET} or {ARROW} files of this name")
    return names


def _files_of_folder(folder: Path) -> list[str]:
    if (folder / SPLITS).is_file():
        splits = ", ".join(str(path.parent) for path in sorted(folder.glob(f"*/{STATE}")))
        raise ConfigError(f"{folder}: holds several splits; name one of them: {splits}")
    if (folder / STATE).is_file():
        with errors_as(ConfigError, f"{folder / STATE}: cannot be read"):
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if state.get("_indices_files") or state.get("_indices_data_files"):
                raise ConfigError(f"{folder}: its rows are chosen by a table of indices; save it anew, flattened")
            return [str(folder / one["filename"]) for one in state["_data_files"]]
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [str(path) for path in shown if path.suffix == PARQUET]
    files = files or [str(path) for path in shown if path.suffix == ARROW]
    splits = sorted({found[1] for name in files if (found := _OF_SPLIT.fullmatch(Path(name).stem))})
    if len(splits) > 1:
        raise ConfigError(f"{folder}: holds several splits; name one, such as {folder}/{splits[-1]}-*{PARQUET}")
    return files


def _remote_files(pattern: str) -> list[str]:
    if "*" not in pattern:
        if suffix_of(pattern):
            return [pattern]
        pattern = f"{pattern.rstrip('/')}/*{PARQUET}"
    files, path = file_system(pattern)
    found = retried(lambda: files.glob(path), pattern)
    return sorted(files.unstrip_protocol(name) for name in found)
