"""The format `image_caption_json`: captions or conversations in a JSON, JSONL or CSV file, and a folder of images; or
both in Parquet or Arrow files (`columns.py`).

Texts are given to the model as they are: the published code cleans captions in stage 1 only, so `text_processor` has
no effect here, though published files name one.
"""

import functools
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, SampleError, errors_as, first_line
from minigpt4.common.remote import is_remote, open_remote, suffix_of
from minigpt4.common.schemas import BuildInfo
from minigpt4.common.utils import escaped, parse_json, require_readable, require_whole_characters
from minigpt4.conversation.llava import IMAGE_TOKEN, SPEAKERS
from minigpt4.datasets.datasets.base_dataset import BaseDataset, ImageReader, LazySample, require_caption
from minigpt4.datasets.datasets.columns import ColumnRecords, StoredImage
from minigpt4.datasets.datasets.records import READERS

CAPTIONS = "captions"
"""Field of a record with the single captions of its image."""
JOINED = "grounded_caption"
"""Field of the captions of an image in one string, as `prepare_flickr30k.py` writes it."""

IMAGE_TAG = "<Img><ImageHere></Img> "
SEPARATOR = "\x1e"
"""Between the questions, and between the answers, of a sample: a control character that no text holds."""


class Records:
    """The records of an annotation file, parsed one at a time; `len()` counts the bad ones too.

    ConfigError when the file as a whole cannot be read; `records.py` has its forms. The records are kept as one block
    of bytes: millions of Python objects would be copied into every worker process as soon as their reference counts
    change.
    """

    columns: set[str] | None = None
    """Names that every record has; None: each has its own."""

    def __init__(self, file: Path | str, cache: str | None = None) -> None:
        self.file = file
        kind = suffix_of(file)
        self.is_table = kind in (".csv", ".tsv", ".token")
        self._noun = "record" if kind == ".json" else "line"
        if kind not in READERS:
            raise ConfigError(f"{file}: unknown kind of file; annotations are read from {', '.join(READERS)}")
        self._block, spans = bytearray(), array("q")
        try:
            for number, record in READERS[kind](read_bytes(file, cache), kind):
                start = len(self._block)
                self._block += record
                spans.extend((number, start, len(self._block)))
        except MiniGPT4Error:
            raise
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror or 'it is not there'})") from error
        except Exception as error:  # whatever parsers raise
            raise ConfigError(f"{file}: {first_line(error)}") from error
        self._spans = np.frombuffer(spans, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record; SampleError that names its place when it is no object."""
        _, start, end = self._spans[index].tolist()
        try:
            record = parse_json(bytes(self._block[start:end]))
        except Exception as error:
            raise SampleError(f"{self.where(index)}: not JSON ({first_line(error)})") from error
        if isinstance(record, dict):
            return record
        why = record if self.is_table else "as the others are"
        raise SampleError(f"{self.where(index)}: not a record of named fields: {why}")

    def where(self, index: int) -> str:
        """The place of a record, such as `birds.jsonl, line 12`; lines and records count from 1."""
        return f"{self.file}, {self._noun} {self._spans[index, 0]}"


def read_bytes(file: Path | str, cache: str | None = None) -> bytes:
    """All of a file, which may be at an address; OSError if it is not there."""
    if not is_remote(file):
        return Path(file).read_bytes()
    with open_remote(str(file), cache) as stream:
        return stream.read()


def single_captions(record: Mapping[str, Any], field: str, where: str) -> list[str] | None:
    """The list of captions of a record, None if it has none; `field` is that of the one caption.

    It stands in the field `captions` or, as in LAVIS's files, in place of the one caption.
    """
    value = record[field] if isinstance(record.get(field), list) else record.get(CAPTIONS)
    return caption_list(value, where) if value else None


def caption_list(value: Any, where: str) -> list[str]:
    """The captions of a list, or of a list as JSON, without blank ones; SampleError if it is none."""
    with errors_as(SampleError, f"{where}: the captions are not JSON"):
        captions = parse_json(value) if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SampleError(f"{where}: the captions must be a list of texts; they are {captions!r:.80}")
    for number, caption in enumerate(captions, start=1):
        require_whole_characters(caption, f"{where}: caption {number}")
    return [caption for caption in captions if caption.strip()]


def conversation_fields(turns: Any, where: str) -> dict[str, str]:
    """`[{"from": "human", "value": "<image> ..."}, {"from": "gpt", "value": "..."}, ...]` -> conv_q, conv_a.

    The image comes before the first question, wherever `<image>` stands in it. A CSV holds the turns as JSON text.
    SampleError that names the turn, counted from 1, when question and answer do not alternate, or one is empty.
    """
    with errors_as(SampleError, f"{where}: the conversation is not JSON"):
        turns = parse_json(turns) if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise SampleError(f"{where}: a conversation must be a list of turns, with an answer to each question")
    texts = []
    for number, turn in enumerate(turns):
        place, speaker = f"{where}: turn {number + 1}", SPEAKERS[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise SampleError(f'{place} must be {{"from": "{speaker}", "value": text}}')
        text = turn["value"]
        if number % 2 == 0 and text.count(IMAGE_TOKEN) > (number == 0):
            raise SampleError(f"{place}: a conversation has one image, {IMAGE_TOKEN} in the first question")
        if not text.replace(IMAGE_TOKEN, "").strip():
            raise SampleError(f"{place} is empty")
        if SEPARATOR in text or "<ImageHere>" in text:
            raise SampleError(f"{place} holds {SEPARATOR!r} or <ImageHere>, which mean something to the model")
        texts.append(require_readable(text, place))
    questions = [text.replace(IMAGE_TOKEN, "").strip() for text in texts[::2]]
    questions[0] = IMAGE_TAG + questions[0]
    return {"conv_q": SEPARATOR.join(questions), "conv_a": SEPARATOR.join(texts[1::2]), "connect_sym": SEPARATOR}


@dataclass(eq=False)
class ImageCaptionJson(BaseDataset):
    """Samples by index; each is a shard of its own.

    [{"image_id": "1000092795", "grounded_caption": "Two young ..."}]            images in image_path/<id>.jpg
    {"annotations": [{"image_id": "2", "caption": "The image shows ..."}]}        storage/image/<id>.jpg
    {"id": "7", "image": "coco/7.png", "conversations": [{"from": "human", ...}]} images in image_path/coco/7.png
    image,captions                                                                images in image_path/dogs/1.jpg
    dogs/1.jpg,"[""A dog."", ""A brown dog.""]"                                   a list of captions is joined
    """

    TEXTS: ClassVar[list[str]] = []
    """Fields of the texts where the section names none; empty: captions, as it says."""

    records: Records | ColumnRecords
    selection: np.ndarray
    """(N,) int64, the records of this split."""
    images: Path | str
    """Folder of the images, or address of one."""
    info: BuildInfo
    """What the fields are called."""
    reader: ImageReader

    @property
    def size(self) -> int:
        """Number of samples, good and bad."""
        return len(self.selection)

    def num_shards(self, readers: int) -> int:
        return self.size

    def open(self, shard: int, readers: int, random: np.random.Generator | None) -> Iterator[LazySample]:
        yield self._lazy(shard, self._load)

    def quick_samples(self) -> Iterator[LazySample]:
        return (self._lazy(index, self._look) for index in range(self.size))

    def describe(self) -> str:
        return f"{self.size:,} records"

    def look(self, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A record, and its sample without the image; SampleError if it is bad."""
        record, where = self._record(index)
        return record, self._look(record, where)

    def image_file(self, index: int) -> Path:
        """File of the image of a record; SampleError if it names none here."""
        record, where = self._record(index)
        (file, *_) = self._image_files(record, where)
        if not isinstance(file, Path):
            raise SampleError(f"{where}: its image is no file here; write the images of this split into a folder")
        return file

    def _record(self, index: int) -> tuple[dict[str, Any], str]:
        """A record and its place."""
        number = int(self.selection[index])
        return self.records[number], self.records.where(number)

    def _lazy(self, index: int, read: Callable[[dict[str, Any], str], dict[str, Any]]) -> LazySample:
        try:
            record, where = self._record(index)
        except SampleError as error:
            return LazySample.failing(self.records.where(int(self.selection[index])), error)
        key = escaped(str(record.get(self.info.id_field, "")))
        return LazySample(key, where, functools.partial(read, record, where))

    def _load(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        sample = self._look(record, where)
        try:
            return {"image": self._read(self._image_files(record, where)), **sample}
        except SampleError as error:
            if str(error).startswith(where):
                raise
            raise SampleError(f"{where}: {error}") from error

    def _read(self, files: "list[Path | StoredImage]") -> Any:
        """What stands under "image" in a sample."""
        return self._read_image(files[0])

    def _read_image(self, source: Path | StoredImage) -> Any:
        if isinstance(source, Path):
            return self.reader.read(source)
        content = source.read()
        if isinstance(content, bytes):
            return self.reader.read(content, source.name)
        return self._read_image(self._located(content, source.name))

    def _located(self, name: str, where: str) -> Path | StoredImage:
        """The image of this name in the folder or at the address of the images, or at an address of its own."""
        if not is_remote(self.images) and not is_remote(name):
            return self.images / name
        url = name if is_remote(name) else f"{str(self.images).rstrip('/')}/{name}"

        def read() -> bytes:
            try:
                with errors_as(SampleError, f"{where}: {url}"):
                    return read_bytes(url, self.info.cache_dir)
            except RunError as error:
                if url == name:  # one of many servers, perhaps
                    raise SampleError(f"{where}: {error}") from error
                raise

        return StoredImage(url, read)

    def _look(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        """All of a sample but its images, which only have to be there."""
        texts = self._texts(record, where)
        files = self._image_files(record, where)
        for file in files:
            if isinstance(file, StoredImage):
                continue
            try:
                exists = file.is_file()
            except OSError:  # a name that no file system takes
                exists = False
            if not exists:
                way_out = "; folders are parted by / here" if "\\" in file.name else ""
                if record.get(self.info.image_field) is None:
                    way_out = f"; build_info.image_suffix is {self.info.image_suffix}"
                raise SampleError(f"{where}: the image {str(file):.300} does not exist{way_out}")
        identity = record.get(self.info.id_field)
        if identity in (None, ""):
            identity = files[0].stem if files and isinstance(files[0], Path) else where
        return {"image_id": escaped(str(identity)), **texts}

    def _texts(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        """The answer, or the fields of a conversation."""
        split, conversation = self.info.split_field, self.info.conversation_field
        if split and record.get(split) in (None, ""):
            raise SampleError(f"{where}: the field {split!r} is missing, the split of the record")
        field = conversation or self.info.caption_field
        value = record.get(field)
        if not conversation and (value is None or isinstance(value, list)):
            captions = single_captions(record, field, where)
            value = None if captions is None else " ".join(captions)
        if value is None:
            hint = "; does the first line name the fields?" if self.records.is_table else ""
            raise SampleError(f"{where}: the field {field!r} is missing; it has {', '.join(record) or 'none'}{hint}")
        return conversation_fields(value, where) if conversation else {"answer": require_caption(value, where)}

    def _image_files(self, record: dict[str, Any], where: str) -> list[Path | StoredImage]:
        identity, name = record.get(self.info.id_field), record.get(self.info.image_field)
        if name is None and identity not in (None, ""):
            name = f"{identity}{self.info.image_suffix}"
        if isinstance(name, StoredImage):
            return [name]
        if not isinstance(name, str) or not name or "\0" in name:
            fields = f"{self.info.image_field!r} or {self.info.id_field!r}"
            raise SampleError(f"{where}: no image; set the field {fields}")
        return [self._located(name, where)]
