"""The format `image_caption_json`: a JSON, JSONL or CSV file of captions or conversations, and a folder of images.

    [{"image_id": "1000092795", "grounded_caption": "Two young guys ..."}]        images in image_path/<id>.jpg
    {"annotations": [{"image_id": "2", "caption": "The image shows ..."}]}        storage/image/<id>.jpg
    {"id": "7", "image": "coco/7.png", "conversations": [{"from": "human", ...}]} images in image_path/coco/7.png
    image,captions                                                                images in image_path/dogs/1.jpg
    dogs/1.jpg,"[""A dog."", ""A brown dog.""]"                                   a list in place of a caption is joined

COCO's annotations, Karpathy's split files and Kaggle's Flickr30k are read, too (foreign.py), and lists of LAVIS, which
have the list in the caption's field. A text of which something was lost (common/text.py) is a bad sample.
`build_info` says what the fields are called. Texts are given to the model as they are: the published code
cleans captions in stage 1 only, so `text_processor` has no effect here, though published files name one.
"""

import functools
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from minigpt4.common.errors import SampleError, errors_as
from minigpt4.common.registry import registry
from minigpt4.common.schemas import BuildInfo
from minigpt4.common.text import escaped, parse_json, require_readable, require_whole_characters
from minigpt4.datasets.datasets.base_dataset import TRAIN, BaseBuilder, Dataset, ImageReader, LazySample, failing
from minigpt4.datasets.datasets.records import SPLIT_FIELD, Records, tells_split
from minigpt4.datasets.feature_store import CachedImage
from minigpt4.processors import Uint8Image

# The captions of a record: one, or a list in its field `captions` or, as in LAVIS's files, in place of the one.


CAPTIONS = "captions"
"""Field of a record with the single captions of its image."""
JOINED = "grounded_caption"
"""Field of the captions of an image in one string, as `prepare_flickr30k.py` writes it."""


def single_captions(record: Mapping[str, Any], field: str, where: str) -> list[str] | None:
    """The list of captions of a record, None if it has none; `field` is that of the one caption."""
    value = record[field] if isinstance(record.get(field), list) else record.get(CAPTIONS)
    return caption_list(value, where) if value else None


def caption_list(value: Any, where: str) -> list[str]:
    """The captions of a list, or of a list as JSON, without blank ones; SampleError if it is none."""
    try:
        captions = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise SampleError(f"{where}: the captions are not JSON: {error}") from error
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SampleError(f"{where}: the captions must be a list of texts; they are {captions!r:.80}")
    for number, caption in enumerate(captions, start=1):
        require_whole_characters(caption, f"{where}: caption {number}")
    return [caption for caption in captions if caption.strip()]


# Conversations in LLaVA's form, as the model takes them.


IMAGE_TAG = "<Img><ImageHere></Img> "
PLACEHOLDER = "<image>"
SEPARATOR = "\x1e"
"""Between the questions, and between the answers, of a sample: a control character that no text holds."""

_SPEAKERS = ("human", "gpt")


def conversation_fields(turns: Any) -> dict[str, str]:
    """`[{"from": "human", "value": "<image> ..."}, {"from": "gpt", "value": "..."}, ...]` -> conv_q, conv_a.

    The image comes before the first question, wherever `<image>` stands in it or whether it stands at all.
    A CSV holds the turns as JSON text. SampleError that names the turn, counted from 1, when they do not
    alternate from a human's question to an answer, or one is empty.
    """
    turns = _read(turns)
    texts = [_text(turn, number) for number, turn in enumerate(turns, start=1)]
    if not texts or len(texts) % 2:
        raise SampleError(f"a conversation needs an answer to each question, it has {len(texts)} turns")
    questions = [_question(text, number) for number, text in enumerate(texts[::2])]
    questions[0] = IMAGE_TAG + questions[0]
    return {"conv_q": SEPARATOR.join(questions), "conv_a": SEPARATOR.join(texts[1::2]), "connect_sym": SEPARATOR}


def _read(turns: Any) -> list[Any]:
    if isinstance(turns, str):
        try:
            turns = parse_json(turns)
        except ValueError as error:
            raise SampleError(f"the conversation is not JSON ({error})") from error
    if not isinstance(turns, list):
        raise SampleError("a conversation must be a list of turns")
    return turns


def _text(turn: Any, number: int) -> str:
    speaker = _SPEAKERS[(number - 1) % 2]
    if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
        raise SampleError(f'turn {number} must be {{"from": "{speaker}", "value": text}}')
    text = turn["value"]
    if not text.replace(PLACEHOLDER, "").strip():
        raise SampleError(f"turn {number} is empty")
    if SEPARATOR in text or "<ImageHere>" in text:
        raise SampleError(f"turn {number} holds {SEPARATOR!r} or <ImageHere>, which mean something to the model")
    return require_readable(text, f"turn {number}")


def _question(text: str, index: int) -> str:
    allowed = 0 if index else 1
    if text.count(PLACEHOLDER) > allowed:
        raise SampleError(f"turn {2 * index + 1}: a conversation has one image, {PLACEHOLDER} in the first question")
    return text.replace(PLACEHOLDER, "").strip()


STORAGE_ANNOTATIONS = "filter_cap.json"
STORAGE_IMAGES = "image"


class ImageCaptionJson(Dataset):
    """Samples by index; each is a unit of its own.

    Args:
        records: the annotation file.
        selection: (N,) int64, the records of this split.
        images: folder of the images.
        info: what the fields are called.
        reader: reads an image file.
    """

    def __init__(
        self,
        name: str,
        split: str,
        records: Records,
        selection: np.ndarray,
        images: Path,
        info: BuildInfo,
        reader: ImageReader,
    ) -> None:
        super().__init__(name, split)
        self.records = records
        self.selection = selection
        self.images = images
        self.info = info
        self.reader = reader

    @property
    def size(self) -> int:
        return len(self.selection)

    def units(self, slots: int) -> int:
        return self.size

    def open(self, unit: int, slots: int, random: np.random.Generator | None) -> Iterator[LazySample]:
        yield self._step(unit, self._load)

    def quick_steps(self) -> Iterator[LazySample]:
        return (self._step(unit, self._look) for unit in range(self.size))

    def describe(self) -> str:
        return f"{self.size:,} records"

    def look(self, unit: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record of a unit, and its sample without the image; SampleError if it is bad."""
        index = int(self.selection[unit])
        record = self.records[index]
        return record, self._look(record, self.records.where(index))

    def image_file(self, unit: int) -> Path:
        """File of the image of a unit; SampleError if its record names none."""
        index = int(self.selection[unit])
        return self._image_file(self.records[index], self.records.where(index))

    def _step(self, unit: int, read: Callable[[dict[str, Any], str], dict[str, Any]]) -> LazySample:
        index = int(self.selection[unit])
        where = self.records.where(index)
        try:
            record = self.records[index]
        except SampleError as error:
            return LazySample("", where, failing(error))
        key = escaped(str(record.get(self.info.id_field, "")))
        return LazySample(key, where, functools.partial(read, record, where))

    def _load(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        sample = self._look(record, where)
        return {"image": self._image(self._image_file(record, where), where), **sample}

    def _look(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        """All of a sample but its image, which only has to be there."""
        texts = self._texts(record, where)
        file = self._image_file(record, where)
        with errors_as(SampleError, f"{where}: the image {file}"):  # there are names that no file system takes
            exists = file.is_file()
        if not exists:
            raise SampleError(f"{where}: the image {file} does not exist")
        identity = record.get(self.info.id_field)
        return {"image_id": escaped(file.stem if identity in (None, "") else str(identity)), **texts}

    def _texts(self, record: dict[str, Any], where: str) -> dict[str, str]:
        split_field = self.info.split_field
        if split_field and record.get(split_field) in (None, ""):
            missing = "" if split_field in record else self._header()
            raise SampleError(f"{where}: the field {split_field!r} is missing, the split of the record{missing}")
        field = self.info.conversation_field or self.info.caption_field
        value = record.get(field)
        if not self.info.conversation_field and (value is None or isinstance(value, list)):
            captions = single_captions(record, field, where)
            value = None if captions is None else " ".join(captions)
        if value is None:
            raise SampleError(
                f"{where}: the field {field!r} is missing; it has {', '.join(record) or 'none'}{self._header()}"
            )
        if self.info.conversation_field:
            return self._conversation(value, where)
        return {"answer": _caption(value, where)}

    def _header(self) -> str:
        """Of a table, whose records all lack the field that one lacks."""
        return "; the first line must name the fields: is it missing?" if self.records.is_table else ""

    def _conversation(self, turns: Any, where: str) -> dict[str, str]:
        try:
            return conversation_fields(turns)
        except SampleError as error:
            raise SampleError(f"{where}: {error}") from None

    def _image_file(self, record: dict[str, Any], where: str) -> Path:
        name = record.get(self.info.image_field)
        if name is None and record.get(self.info.id_field) not in (None, ""):
            name = f"{record[self.info.id_field]}{self.info.image_suffix}"
        if not isinstance(name, str) or not name or "\0" in name:
            fields = f"{self.info.image_field!r} or {self.info.id_field!r}"
            header = "" if {self.info.image_field, self.info.id_field} & record.keys() else self._header()
            raise SampleError(f"{where}: no image; set the field {fields}{header}")
        return self.images / name

    def _image(self, file: Path, where: str) -> Tensor | Uint8Image | CachedImage:
        try:
            return self.reader.read_sample(file)
        except SampleError as error:
            raise SampleError(f"{where}: {error}") from error


def _caption(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise SampleError(f"{where}: the caption must be text, it is {value!r:.80}")
    if not value.strip():
        raise SampleError(f"{where}: the caption is empty")
    return require_readable(value, f"{where}: the caption")


@registry.register_builder("flickr30k_grounded_detail")
@registry.register_builder("cc_sbu_align")
@registry.register_builder("image_caption_json")
class ImageCaptionJsonBuilder(BaseBuilder):
    """Builds `ImageCaptionJson`: a file for each split, or one file with `split_field`, which is read once for all."""

    SPLIT_KEYS: ClassVar[dict[str, str]] = {TRAIN: "ann_path", "val": "val_ann_path", "test": "test_ann_path"}

    def build(self, split: str) -> ImageCaptionJson:
        info = self.config.build_info
        records = self._records(split)
        if not info.split_field and tells_split(next(self._parsed(records), {})):
            raise self.error(
                f"{records.file} holds all splits; name it by ann_path, and set split_field: {SPLIT_FIELD}"
            )
        selection = self._selection(records, split)
        if not len(selection):
            raise self.error(f"{records.file} has no records of the split {split!r}")
        images = Path(info.storage) / STORAGE_IMAGES if info.storage else Path(self._required_images())
        return ImageCaptionJson(self.name, split, records, selection, images, info, self.image_reader(split))

    def splits(self) -> list[str]:
        info = self.config.build_info
        if info.split_field:
            return sorted(self._by_split)
        own = [TRAIN] if info.storage else []
        return own + super().splits()

    def _required_images(self) -> str:
        path = self.config.build_info.image_path
        if not path:
            raise self.error("build_info.image_path: is missing; set ann_path and image_path, or storage")
        return path

    def _annotations(self, split: str) -> Path:
        info = self.config.build_info
        file_split = TRAIN if info.split_field else split
        if info.storage and file_split == TRAIN:
            file = Path(info.storage) / STORAGE_ANNOTATIONS
        else:
            file = Path(self.require_files(file_split))
        if not file.is_file():
            raise self.error(f"{file} does not exist; it holds the captions of the split {split!r}")
        return file

    def _records(self, split: str) -> Records:
        return self._common_records if self.config.build_info.split_field else Records(self._annotations(split))

    @functools.cached_property
    def _common_records(self) -> Records:
        """Of the one file that holds all splits."""
        return Records(self._annotations(TRAIN))

    @functools.cached_property
    def _by_split(self) -> dict[str, np.ndarray]:
        """Of the same file: which records belong to which split."""
        chosen: dict[str, array] = {}
        for index, record in enumerate(self._parsed(self._common_records)):
            chosen.setdefault(self._split(record), array("q")).append(index)
        return {split: np.frombuffer(indices, dtype=np.int64) for split, indices in chosen.items()}

    def _selection(self, records: Records, split: str) -> np.ndarray:
        if self.config.build_info.split_field:
            return self._by_split.get(split, np.empty(0, dtype=np.int64))
        return np.arange(len(records))

    def _parsed(self, records: Records) -> Iterator[dict[str, Any]]:
        for index in range(len(records)):
            try:
                yield records[index]
            except SampleError:
                yield {}

    def _split(self, record: dict[str, Any]) -> str:
        """Split of a record; one that cannot be told is reported as a bad record of the training split."""
        return str(record.get(self.config.build_info.split_field) or TRAIN)
