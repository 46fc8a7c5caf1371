"""Schema of one dataset under the YAML section `datasets:`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from minigpt4.common.schemas.checks import at_least, batch_sizes, require

SHARDS = "image_caption_shards"
JSON = "image_caption_json"


@dataclass
class BuildInfo:
    """Where the data lies, `storage`, or `ann_path` with `image_path`, and what its fields are called."""

    REFUSED_KEYS: ClassVar[Mapping[str, str]] = {
        "annotations": "LAVIS's nested form is not read; set ann_path",
        "images": "LAVIS's nested form is not read; set image_path",
    }

    storage: str | None = field(default=None, metadata={"path": "data", "training": True})
    """Tar shards as `shards/{000..099}.tar` or a URL; or the folder with `filter_cap.json` and `image/`."""

    val_storage: str | None = field(default=None, metadata={"path": "data later"})
    """New. Tar shards of the split `val`."""

    test_storage: str | None = field(default=None, metadata={"path": "data later"})
    """New. Tar shards of the split `test`."""

    ann_path: str | None = field(default=None, metadata={"path": "file", "training": True})
    """File with the captions: `.json`, `.jsonl`, `.csv` or `.tsv`."""

    val_ann_path: str | None = field(default=None, metadata={"path": "later"})
    """New. The same for the split `val`. Like `test_ann_path` it is looked for only when a run uses the split."""

    test_ann_path: str | None = field(default=None, metadata={"path": "later"})
    """New. The same for the split `test`."""

    image_path: str | None = field(default=None, metadata={"path": "dir"})
    """Folder of the images, of all splits."""

    caption_field: str = "caption"
    """New. Field of the caption, in the records of the file or in the `.json` members of the shards."""

    id_field: str = "image_id"
    """New. Field of the name of a sample."""

    image_field: str = "image"
    """New. Field of the image's file name in `image_path`; a record without it has the image `<id><image_suffix>`."""

    image_suffix: str = ".jpg"
    """New. Ending of the images whose records give only an id."""

    conversation_field: str | None = None
    """New. Field of the turns of a conversation, `[{"from": "human", "value": "..."}, {"from": "gpt", ...}]`;
    set: the records are conversations, and `caption_field` is not read."""

    split_field: str | None = None
    """New. Field that says of each record of `ann_path` which split it belongs to; null: each split has a file."""

    def __post_init__(self) -> None:
        annotations = self.ann_path or self.val_ann_path or self.test_ann_path
        if self.image_path and not annotations:
            raise ValueError("ann_path: is missing; ann_path (val_ann_path, test_ann_path) and image_path go together")
        if self.ann_path and not self.image_path:
            raise ValueError("image_path: is missing; ann_path and image_path go together")
        if self.storage and (self.ann_path or self.image_path):
            raise ValueError("storage: cannot stand beside ann_path and image_path; set storage: null")
        if self.split_field and (self.val_ann_path or self.test_ann_path):
            raise ValueError("split_field: cannot stand beside val_ann_path and test_ann_path; set one or the other")


@dataclass
class VisProcessorConfig:
    """One image processor."""

    name: str
    """Registered name: `blip2_image_train` or `blip2_image_eval`, the same here: resize and normalise."""

    image_size: int | None = None
    """Side of the square image, pixels; null: the model's `image_size`, which it must equal."""

    kwargs: dict[str, Any] = field(default_factory=dict, metadata={"extra": True})
    """Every other key, for the processor's constructor."""

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the processor's constructor."""
        size = {} if self.image_size is None else {"image_size": self.image_size}
        return {**size, **self.kwargs}


@dataclass
class TextProcessorConfig:
    """One text processor."""

    name: str
    """Registered name."""

    kwargs: dict[str, Any] = field(default_factory=dict, metadata={"extra": True})
    """Every other key, such as `prompt` and `max_words`, for the processor's constructor."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the processor's constructor."""
        return dict(self.kwargs)


@dataclass
class VisProcessors:
    """Image processors of the training split and of the others."""

    train: VisProcessorConfig = field(default_factory=lambda: VisProcessorConfig("blip2_image_train"))
    """For the training split."""

    eval: VisProcessorConfig = field(default_factory=lambda: VisProcessorConfig("blip2_image_eval"))
    """For all other splits."""


@dataclass
class TextProcessors:
    """Text processors of the training split and of the others.

    They clean the captions of tar shards. Captions and conversations of JSON, JSONL and CSV files keep their
    case and punctuation, whatever stands here, as in the published stage 2, whose file names `blip_caption` too.
    """

    train: TextProcessorConfig = field(default_factory=lambda: TextProcessorConfig("blip_caption"))
    """For the training split."""

    eval: TextProcessorConfig = field(default_factory=lambda: TextProcessorConfig("blip_caption"))
    """For all other splits."""


@dataclass
class DatasetConfig:
    """One dataset: a format (`builder`), where the data lies, and how much of a batch mix it is."""

    builder: str
    """Registered name of the format: `image_caption_shards`, `image_caption_json`, or one of your own."""

    type: str = "default"
    """Which default file lies under this section."""

    data_type: Literal["images"] = "images"
    """What the samples hold beside text."""

    batch_size: int | None = None
    """Training batch per GPU; null: `run.batch_size_train`."""

    sample_ratio: float = 1.0
    """Weight among the datasets: each iteration draws its dataset by these weights."""

    build_info: BuildInfo = field(default_factory=BuildInfo)
    """Where the data lies."""

    vis_processor: VisProcessors = field(default_factory=VisProcessors)
    """Image processors."""

    text_processor: TextProcessors = field(default_factory=TextProcessors)
    """Text processors."""

    def __post_init__(self) -> None:
        batch_sizes(self, "batch_size")
        require(self.sample_ratio > 0, "sample_ratio", self.sample_ratio, "above 0")
        info = self.build_info
        if self.builder == SHARDS and not (info.storage or info.val_storage or info.test_storage):
            raise ValueError("build_info.storage: is missing; it says where the tar shards are")
        if self.builder == JSON and not (info.storage or info.image_path):
            raise ValueError("build_info.ann_path: is missing; set ann_path and image_path, or storage")
