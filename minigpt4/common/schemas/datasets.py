"""Schema of one dataset under the YAML section `datasets:`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from minigpt4.common.schemas.checks import at_least, require

SHARDS = "image_caption_shards"
JSON = "image_caption_json"


@dataclass
class BuildInfo:
    """Where the data lies: `storage`, or `ann_path` with `image_path`."""

    REFUSED_KEYS: ClassVar[Mapping[str, str]] = {
        "annotations": "LAVIS's nested form is not read; set ann_path",
        "images": "LAVIS's nested form is not read; set image_path",
    }

    storage: str | None = field(default=None, metadata={"path": "data"})
    """Tar shards as `shards/{000..099}.tar` or a URL; or the folder with `filter_cap.json` and `image/`."""

    ann_path: str | None = field(default=None, metadata={"path": "file"})
    """File with the captions."""

    image_path: str | None = field(default=None, metadata={"path": "dir"})
    """Folder of the images."""

    def __post_init__(self) -> None:
        pair = [self.ann_path, self.image_path]
        if any(pair) and not all(pair):
            lacking = "image_path" if self.ann_path else "ann_path"
            raise ValueError(f"{lacking}: is missing; ann_path and image_path go together")
        if self.storage and any(pair):
            raise ValueError("storage: cannot stand beside ann_path and image_path; set storage: null")


@dataclass
class VisProcessorConfig:
    """One image processor."""

    name: str
    """Registered name: `blip2_image_train` or `blip2_image_eval`, the same here: resize and normalise."""

    image_size: int = 224
    """Side of the square image, pixels; the model's `image_size`."""

    kwargs: dict[str, Any] = field(default_factory=dict, metadata={"extra": True})
    """Every other key, for the processor's constructor."""

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the processor's constructor."""
        return {"image_size": self.image_size, **self.kwargs}


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
    """Text processors of the training split and of the others."""

    train: TextProcessorConfig = field(default_factory=lambda: TextProcessorConfig("blip_caption"))
    """For the training split."""

    eval: TextProcessorConfig = field(default_factory=lambda: TextProcessorConfig("blip_caption"))
    """For all other splits."""


@dataclass
class DatasetConfig:
    """One dataset: a format (`builder`), where the data lies, and how much of a batch mix it is."""

    builder: str
    """Registered name of the format: `image_caption_shards` or `image_caption_json`."""

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
        at_least(self, 1, "batch_size")
        require(self.sample_ratio > 0, "sample_ratio", self.sample_ratio, "above 0")
        info = self.build_info
        if self.builder == SHARDS and not info.storage:
            raise ValueError("build_info.storage: is missing; it says where the tar shards are")
        if self.builder == JSON and not (info.storage or info.ann_path):
            raise ValueError("build_info.ann_path: is missing; set ann_path and image_path, or storage")
