"""The sections `run:` and `datasets:` of a configuration, as dataclasses: keys, types, defaults and ranges.

A field's docstring is its documentation; "New." marks keys that the published code does not have.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.decoding import Decoding

SHARDS = "image_caption_shards"
JSON = "image_caption_json"
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
MOST_WORKERS = 1_000
TRAINING_KEYS = ("init_lr", "max_epoch", "iters_per_epoch")
MOST_SAMPLES = 1_000_000
"""Of a batch: far above what any GPU holds, and still a size that can be computed with."""


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """ValueError `key: value must be rule`, unless `ok`; `bind` adds section and file."""
    if not ok:
        raise ValueError(f"{key}: {value!r:.200} must be {rule}")


def at_least(schema: object, low: float, *keys: str) -> None:
    """Each of these fields is None or not below `low`."""
    for key in keys:
        value = getattr(schema, key)
        require(value is None or value >= low, key, value, f"at least {low}")


def batch_sizes(schema: object, *keys: str) -> None:
    """Each of these fields is None or the size of a batch."""
    for key in keys:
        value = getattr(schema, key)
        require(value is None or value >= 1, key, value, "at least 1")
        require(value is None or value <= MOST_SAMPLES, key, value, f"at most {MOST_SAMPLES:,}")


@dataclass
class FailurePrompts:
    """`run.failure_prompts`: one prompt a task, with one `<ImageHere>`, put into `model.prompt_template`."""

    detail: str = "<Img><ImageHere></Img> Describe this image in detail."
    """Asks for prose."""

    poem: str = "<Img><ImageHere></Img> Write a poem about this image."
    """Asks for verse."""


@dataclass(frozen=True)
class GenerationSettings(Decoding):
    """`run.generation`: decoding, prompt and end of captions. The defaults are greedy: the same in every run."""

    max_new_tokens: int = 160
    """Longest caption, tokens: what `max_txt_len` of the published recipes allows in training."""

    prompt: str | None = None
    """Instruction with one `<ImageHere>`, put into `model.prompt_template`; null: the first of `model.prompt_path`,
    or the image alone if there is no such file."""

    stop: list[str] | None = None
    """Strings that end a caption; null: `model.end_sym`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(all(self.stop or []), "stop", self.stop, "a list of strings of which none is empty")


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


@dataclass
class RunConfig:
    """How a run goes. A run that trains also needs `init_lr`, `max_epoch` and `iters_per_epoch`."""

    REFUSED_KEYS: ClassVar[Mapping[str, str]] = {
        "max_iters": "runs count epochs here; set max_epoch and iters_per_epoch",
        "iters_per_inner_epoch": "runs count epochs here; set max_epoch and iters_per_epoch",
        "grad_norm_clip": "it is called max_grad_norm here",
        "lr_layer_decay": "one learning rate serves all trained parameters",
    }

    task: str = "image_text_pretrain"
    """Registered name of the task: what a train step and an evaluation step are."""

    runner: str = "runner_base"
    """Registered name of the runner: the loop over epochs."""

    lr_sched: str = "linear_warmup_cosine_lr"
    """Registered name of the schedule: `linear_warmup_cosine_lr` or `linear_warmup_step_lr`."""

    init_lr: float | None = None
    """Learning rate that the warm-up leads to; needed to train."""

    min_lr: float = 0.0
    """Lowest learning rate, where the schedule ends."""

    warmup_lr: float | None = -1.0
    """Learning rate of the first step; negative or null: `init_lr`, no ramp."""

    warmup_steps: int = 0
    """Length of the warm-up, iterations; one longer than an epoch starts again with each epoch."""

    lr_decay_rate: float | None = None
    """Factor on the rate per epoch, for `linear_warmup_step_lr`; null: 1."""

    weight_decay: float = 0.05
    """AdamW's decay of matrices; biases and other 1-D parameters have none."""

    beta2: float = 0.999
    """AdamW's second beta; the first is 0.9."""

    max_epoch: int | None = None
    """Epochs to train; needed to train."""

    iters_per_epoch: int | None = None
    """Iterations (micro-batches) of an epoch, whatever the size of the data; needed to train."""

    accum_grad_iters: int = 1
    """Gradient-accumulation steps."""

    accum_loss: Literal["mean", "sum"] = "mean"
    """New. `mean`: an update follows the mean over all supervised tokens of its iterations and ranks, however
    they are cut; `sum`: the published behaviour, the losses of the iterations are added."""

    max_grad_norm: float | None = None
    """New. Clip the gradient of an update to this norm; null: no clipping, as published."""

    max_nonfinite_steps: int = 10
    """New. Updates in a row with a loss or gradient that is not finite before the run stops; each is skipped."""

    num_workers: int = 4
    """Loader processes per GPU and dataset; 0 loads in the main process."""

    batch_size_train: int | None = None
    """Training batch per GPU of datasets that set no `batch_size` themselves."""

    batch_size_eval: int | None = None
    """Evaluation batch per GPU; null: the training batch."""

    seed: int = 42
    """Seed of everything random; the rank is added to it."""

    output_dir: str = field(default="output", metadata={"path": "later"})
    """Folder of runs; each makes a folder of its own in it, named by its job id."""

    amp: bool = False
    """Automatic mixed precision in training."""

    amp_dtype: Literal["fp16", "bf16"] = "fp16"
    """Precision under `amp`; fp16 comes with a gradient scaler."""

    compile: bool = False
    """New. torch.compile on norms, MLPs and the vision side's blocks: faster steps after a slower first one."""

    feature_cache: str | None = field(default=None, metadata={"path": "later"})
    """New. Folder where what the frozen vision side gives for each image is kept, for all ranks, epochs, runs and
    evaluations; null: images are encoded each time."""

    save_every_iters: int | None = None
    """New. Also save a checkpoint after each so many iterations; null: at the end of each epoch only."""

    keep_last: int | None = None
    """New. Keep this many checkpoints of `save_every_iters`; those of epochs and the best stay. Null: all."""

    resume_ckpt_path: str | None = field(default=None, metadata={"path": "checkpoint"})
    """Checkpoint of an earlier run to go on from, optimizer, data position and random state included; `auto`:
    the newest whole one of this job in `output_dir`, or a start from scratch if there is none."""

    max_bad_share: float = 0.01
    """New. Share of samples that may be unreadable before the run stops."""

    max_bad_in_a_row: int = 100
    """New. Unreadable samples in a row before the run stops."""

    evaluate: bool = False
    """Evaluate `resume_ckpt_path`, else `model.ckpt`, on `test_splits` and do not train."""

    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Dataset splits to train on."""

    valid_splits: list[str] = field(default_factory=list)
    """Splits to evaluate after each epoch."""

    valid_captions: int = 0
    """New. Images that are captioned and scored (BLEU, CIDEr, ROUGE-L) in the validation after each epoch and of each
    test split; 0: two captions are shown in the log, none is scored."""

    test_splits: list[str] = field(default_factory=list)
    """Splits to evaluate at the end, on the best epoch where `valid_splits` tell it, or alone with `evaluate`."""

    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """New. How captions are decoded in an evaluation, the same for all checkpoints."""

    failure_prompts: FailurePrompts = field(default_factory=FailurePrompts)
    """New. What `eval_scripts/eval_failure_rate.py` asks about every image."""

    device: str = "cuda"
    """`cuda`, `cuda:N`, `cpu` or `mps`."""

    world_size: int = 1
    """Number of processes; torchrun's own number goes before it."""

    dist_url: str = "env://"
    """Where the processes of a distributed run meet; `env://`: as torchrun says."""

    distributed: bool = True
    """Use several processes when the run was launched with several."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """New. What several processes hold of the frozen LLM: `ddp`: each of them all of it; `fsdp`: its layers are spread
    over them (torch FSDP2), for an LLM that one GPU does not hold. The trained parameters are whole in both."""

    use_dist_eval_sampler: bool = True
    """Split evaluation data over the processes; False: each reads all of it."""

    wandb_log: bool = False
    """Log to Weights & Biases too, from rank 0."""

    tensorboard_log: bool = False
    """New. Write TensorBoard event files into the run's folder too, from rank 0."""

    job_name: str = "minigpt4"
    """Name of the run for Weights & Biases."""

    log_freq: int = 50
    """Iterations between two lines of the training log."""

    def __post_init__(self) -> None:
        at_least(self, 0, "min_lr", "warmup_steps", "weight_decay", "num_workers", "seed", "valid_captions")
        at_least(self, 1, "max_epoch", "iters_per_epoch", "accum_grad_iters", "log_freq", "world_size")
        batch_sizes(self, "batch_size_train", "batch_size_eval")
        at_least(self, 1, "save_every_iters", "keep_last")
        at_least(self, 1, "max_nonfinite_steps", "max_bad_in_a_row")
        require(self.num_workers <= MOST_WORKERS, "num_workers", self.num_workers, f"at most {MOST_WORKERS:,}")
        require(0 <= self.max_bad_share <= 1, "max_bad_share", self.max_bad_share, "between 0 and 1")
        norm = self.max_grad_norm
        require(norm is None or norm > 0, "max_grad_norm", norm, "above 0")
        require(0 < self.beta2 < 1, "beta2", self.beta2, "between 0 and 1")
        decay = self.lr_decay_rate
        require(decay is None or 0 < decay <= 1, "lr_decay_rate", decay, "above 0 and at most 1")
        require(bool(DEVICE.fullmatch(self.device)), "device", self.device, "cuda, cuda:N, cpu or mps")
        if self.init_lr is not None:
            require(self.init_lr > 0, "init_lr", self.init_lr, "above 0")
            require(self.min_lr <= self.init_lr, "min_lr", self.min_lr, f"at most init_lr ({self.init_lr})")

    def splits(self) -> list[str]:
        """Every split that the run reads, once."""
        before = [] if self.evaluate else [*self.train_splits, *self.valid_splits]
        return list(dict.fromkeys([*before, *self.test_splits]))

    def require_training_keys(self, source: str) -> None:
        """ConfigError naming what a run that trains lacks; `source` is the file to name."""
        missing = [key for key in TRAINING_KEYS if getattr(self, key) is None]
        if missing and not self.evaluate:
            keys = ", ".join(f"run.{key}" for key in missing)
            raise ConfigError(f"{source}: {keys}: needed to train; set evaluate: True to evaluate only")
