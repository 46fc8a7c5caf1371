"""The sections `run:` and `datasets:` of a configuration, as dataclasses: keys, types, defaults and ranges.

A field's docstring is its documentation; "New." marks keys that the published code does not have.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Lt
from pydantic import model_validator

from minigpt4.common.binding import (
    BatchSize,
    Float,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PathTo,
    PositiveFloat,
    PositiveInt,
    refuse,
)
from minigpt4.conversation.decoding import Decoding

SHARDS = "image_caption_shards"
JSON = "image_caption_json"
CONVERSATIONS = "llava_conversations"
DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?")
NAMES_OF_TRAINER = {
    "learning_rate": "init_lr",
    "num_train_epochs": "max_epoch",
    "gradient_accumulation_steps": "accum_grad_iters",
    "lr_scheduler_type": "lr_sched",
    "save_steps": "save_every_iters",
}
"""Of transformers, in whose words LLaVA's scripts are written."""
TEXT_FILES = (".json", ".jsonl", ".csv", ".tsv", ".token")
"""Endings of annotation files, which name images; others can hold them."""
TRAINING_KEYS = ("init_lr", "max_epoch", "iters_per_epoch")


@dataclass
class ChatSettings:
    """`run.chat`: what the page begins with, and what it and the server offer beside `model.ckpt`."""

    ckpt: list[str] = field(default_factory=list)
    """Further checkpoints to choose from, NAME=FILE each, as after `--ckpt`; those that are not there are left out."""
    temperature: Annotated[Float, Ge(0), Le(2)] = 1.0
    """0: the likeliest answer."""
    hint: str = ""
    """A line above the conversation: what to try."""
    question: str = "Describe this image in detail."
    """The question of the page's examples."""


@dataclass
class FailurePrompts:
    """`run.failure_prompts`: one prompt a task, with one `<ImageHere>`, put into `model.prompt_template`."""

    detail: str = "<Img><ImageHere></Img> Describe this image in detail."
    poem: str = "<Img><ImageHere></Img> Write a poem about this image."


@dataclass
class VqaPrompts:
    """`vqa_prompts:` of `eval_configs/vqa_prompts.yaml`: how benchmarks are asked."""

    texts: dict[str, str]
    """By name: one `<ImageHere>`, and `{}` for the question; put into `model.prompt_template`."""
    benchmarks: dict[str, dict[str, str]]
    """By benchmark: the names of its texts by `model.model_type` or `model.arch`, or else `default`."""

    def __post_init__(self) -> None:
        named = [(f"{one}.{key}", name) for one, own in self.benchmarks.items() for key, name in own.items()]
        wrong = [name for name, text in self.texts.items() if text.count("{}") != 1 or text.count("<ImageHere>") != 1]
        refuse(
            *((True, f"texts.{name}: must hold {{}} and <ImageHere> exactly once") for name in wrong),
            *((name not in self.texts, f"benchmarks.{key}: {name!r} is none of the texts") for key, name in named),
            *(("default" not in own, f"benchmarks.{one}.default: is missing") for one, own in self.benchmarks.items()),
        )

    def of(self, benchmark: str, *kinds: str) -> tuple[str, str]:
        """Name and text of a benchmark's prompt, by the first of the kinds of model that it knows."""
        own = self.benchmarks[benchmark]
        name = own[next((kind for kind in kinds if kind in own), "default")]
        return name, self.texts[name]


@dataclass(frozen=True)
class AdvancedTask:
    """One of `run.advanced_tasks`, by its name: a task that answers need a judge for."""

    question: str
    """To every image."""
    criterion: str = "it does what was asked, about what the image shows"
    """What an answer passes by; judges read it."""


@dataclass(frozen=True)
class GenerationSettings(Decoding):
    """`run.generation`: decoding, prompt and end of captions. The defaults are greedy: the same in every run."""

    max_new_tokens: int = 160
    """Longest caption, tokens: what `max_txt_len` of the published recipes allows in training."""
    prompt: str | None = None
    """Instruction with one `<ImageHere>`; null: the first of `model.prompt_path`, else the image alone."""
    stop: list[str] | None = None
    """Strings that end a caption; null: `model.end_sym`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (self.temperature <= 0, f"temperature: {self.temperature} must be above 0"),
            (not all(self.stop or []), f"stop: {self.stop!r:.200} must hold no empty string"),
        )


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint: where it is, how it is asked, and what that may cost."""

    url: str
    """Of a server (`http://localhost:8000`), of its API (`https://api.openai.com/v1`) or of `.../chat/completions`."""
    model: str
    """Name of the model that is to answer."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; unset: requests carry none, which is right for local servers."""
    timeout: Float = 120.0
    """Seconds without a sign of the server."""
    attempts: PositiveInt = 6
    """Of a request that fails with status 429 or 5xx, a time-out or a broken connection; waits grow in between."""
    max_tokens: PositiveInt = 1024
    """Of one answer."""
    temperature: NonNegativeFloat = 0.0
    at_once: Int = 8
    """Requests under way at a time."""
    requests_per_minute: PositiveInt | None = None
    """Sent at even intervals, retries included; null: no limit."""
    tokens_per_minute: PositiveInt | None = None
    """Tokens sent, estimated from characters, and the bound of those that come back; null: no limit."""
    price_in: NonNegativeFloat | None = None
    """Of a million tokens sent; null: tokens are shown, and no price."""
    price_out: NonNegativeFloat | None = None
    """Of a million tokens that come back."""
    cost_limit: PositiveFloat | None = None
    """In the unit of the prices: no request is sent that could exceed it; null: no limit."""


@dataclass
class BuildInfo:
    """Where the data lies, `storage`, or `ann_path` with `image_path`, and what its fields are called."""

    REFUSED_KEYS: ClassVar[Mapping[str, str]] = {
        "annotations": "LAVIS's nested form is not read; set ann_path",
        "images": "LAVIS's nested form is not read; set image_path",
    }

    storage: Annotated[str | None, PathTo("data", training=True)] = None
    """Tar shards as `shards/{000..099}.tar`, at an address, too (http, s3, gs); or the folder with `filter_cap.json`
    and `image/`, or Parquet and Arrow files as `ann_path` takes them."""
    val_storage: Annotated[str | None, PathTo("data", later=True)] = None
    """New. Tar shards of the split `val`."""
    test_storage: Annotated[str | None, PathTo("data", later=True)] = None
    """New. Tar shards of the split `test`."""
    ann_path: Annotated[str | None, PathTo("data", training=True)] = None
    """Captions or conversations: a `.json`, `.jsonl`, `.csv` or `.tsv` file; or `.parquet` and `.arrow` files, which
    may hold the images, too: one, a pattern such as `data/train-*.parquet`, or a folder, as of `save_to_disk`. Also an
    address (http, s3, gs)."""
    val_ann_path: Annotated[str | None, PathTo("data", later=True)] = None
    """New. The same for the split `val`. Like `test_ann_path` it is looked for only when a run uses the split."""
    test_ann_path: Annotated[str | None, PathTo("data", later=True)] = None
    """New. The same for the split `test`."""
    image_path: Annotated[str | None, PathTo("dir")] = None
    """Folder of the images, of all splits, or an address; not needed where the annotations hold them."""
    cache_dir: Annotated[str | None, PathTo("dir", later=True)] = None
    """New. Folder that keeps copies of the files at addresses; null: they are read there each time."""
    caption_field: str = "caption"
    """New. Field of the caption, in the records of the file or in the `.json` members of the shards."""
    id_field: str = "image_id"
    """New. Field of the name of a sample."""
    image_field: str = "image"
    """New. Field of the image's file name in `image_path`, or column of images; a record without it has the image
    `<id><image_suffix>`."""
    image_suffix: str = ".jpg"
    """New. Ending of the images whose records give only an id."""
    conversation_field: str | None = None
    """New. Field of the turns, `[{"from": "human", "value": "..."}, {"from": "gpt", ...}]`, in place of captions."""
    max_samples: PositiveInt | None = None
    """New. Train on so many records of an annotation file, the same in each run, fewer a part of more; null: all."""
    split_field: str | None = None
    """New. Field of `ann_path` that names a record's split; null: each split has a file."""

    def __post_init__(self) -> None:
        splits, files = self.val_ann_path or self.test_ann_path, self.ann_path or self.image_path
        beside = "cannot stand beside val_ann_path and test_ann_path; set one or the other"
        names_images = (self.ann_path or "").lower().endswith(TEXT_FILES)
        refuse(
            (self.image_path and not self.annotations, "ann_path: is missing, or val_ann_path, test_ann_path"),
            (names_images and not self.image_path, "image_path: is missing; ann_path and image_path go together"),
            (self.storage and files, "storage: cannot stand beside ann_path and image_path; set storage: null"),
            (self.split_field and splits, f"split_field: {beside}"),
        )

    @property
    def annotations(self) -> str | None:
        """Those of the first split that has some."""
        return self.ann_path or self.val_ann_path or self.test_ann_path


@dataclass
class ProcessorConfig:
    """One image or text processor."""

    name: str
    """Registered name: `blip2_image_train` or `blip2_image_eval` (both resize and normalise), or `blip_caption`."""
    image_size: PositiveInt | None = None
    """Side of the square image, pixels; null: the model's `image_size`, which it must equal. Not for text."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Every other key, such as `max_words`, for the processor's constructor."""

    @model_validator(mode="before")
    @classmethod
    def collect_kwargs(cls, values: Any) -> Any:
        """Before the types are checked, keys that are no fields move to `kwargs`."""
        if not isinstance(values, Mapping):
            return values
        own = {key: value for key, value in values.items() if key in ("name", "image_size")}
        return own | {"kwargs": {str(key): value for key, value in values.items() if key not in own}}

    def arguments(self) -> dict[str, Any]:
        size = {} if self.image_size is None else {"image_size": self.image_size}
        return size | self.kwargs


@dataclass
class VisProcessors:
    """Image processors of the training split and of the others."""

    train: ProcessorConfig = field(default_factory=lambda: ProcessorConfig("blip2_image_train"))
    eval: ProcessorConfig = field(default_factory=lambda: ProcessorConfig("blip2_image_eval"))


@dataclass
class TextProcessors:
    """Text processors of the training split and of the others, for captions of tar shards only: those of JSON, JSONL
    and CSV files keep their case and punctuation, as in the published stage 2."""

    train: ProcessorConfig = field(default_factory=lambda: ProcessorConfig("blip_caption"))
    eval: ProcessorConfig = field(default_factory=lambda: ProcessorConfig("blip_caption"))


@dataclass
class DatasetConfig:
    """One dataset: a format (`builder`), where the data lies, and how much of a batch mix it is."""

    builder: str
    """Registered name of the format: `image_caption_shards`, `image_caption_json`, `llava_conversations`, or one of
    your own."""
    type: str = "default"
    """Which default file lies under this section."""
    data_type: Literal["images"] = "images"
    """What the samples hold beside text."""
    batch_size: BatchSize | None = None
    """Training batch per GPU; null: `run.batch_size_train`."""
    sample_ratio: PositiveFloat = 1.0
    """Weight among the datasets: each iteration draws its dataset by these weights."""
    group_by_modality_length: bool = False
    """New. LLaVA's order: batches of samples of similar length, all with an image or all without. It needs the lengths,
    which `llava_conversations` tells."""
    build_info: BuildInfo = field(default_factory=BuildInfo)
    vis_processor: VisProcessors = field(default_factory=VisProcessors)
    text_processor: TextProcessors = field(default_factory=TextProcessors)

    def __post_init__(self) -> None:
        info = self.build_info
        shards = info.storage or info.val_storage or info.test_storage
        of_shards = self.builder == SHARDS
        lengths = f"{self.builder} tells no lengths; it goes with builder: {CONVERSATIONS}"
        lacks_files = self.builder in (JSON, CONVERSATIONS) and not (info.storage or info.annotations)
        grouped = self.group_by_modality_length and self.builder in (SHARDS, JSON)
        refuse(
            (of_shards and not shards, "build_info.storage: is missing; it says where the tar shards are"),
            (of_shards and str(info.storage).endswith(".parquet"), f"builder: Parquet files go with builder: {JSON}"),
            (of_shards and info.max_samples, "build_info.max_samples: is for annotation files; name fewer shards"),
            (grouped, f"group_by_modality_length: {lengths}"),
            (lacks_files, "build_info.ann_path: is missing; set ann_path and image_path, or storage"),
        )


@dataclass
class RunConfig:
    """How a run goes. A run that trains also needs `init_lr`, `max_epoch` and `iters_per_epoch`."""

    REFUSED_KEYS: ClassVar[Mapping[str, str]] = {
        "max_iters": "runs count epochs here; set max_epoch and iters_per_epoch",
        "iters_per_inner_epoch": "runs count epochs here; set max_epoch and iters_per_epoch",
        "grad_norm_clip": "it is called max_grad_norm here",
        "lr_layer_decay": "one learning rate serves all trained parameters",
        **{key: f"it is called {own} here" for key, own in NAMES_OF_TRAINER.items()},
        "per_device_train_batch_size": "each dataset has its batch_size",
    }

    task: str = "image_text_pretrain"
    """Registered name of the task: what a train step and an evaluation step are."""
    runner: str = "runner_base"
    """Registered name of the runner: the loop over epochs."""
    lr_sched: str = "linear_warmup_cosine_lr"
    """Registered name of the schedule: `linear_warmup_cosine_lr`, `linear_warmup_step_lr`, or LLaVA's `cosine_lr`."""

    init_lr: PositiveFloat | None = None
    """Learning rate that the warm-up leads to; needed to train."""
    min_lr: NonNegativeFloat = 0.0
    """Lowest learning rate, where the schedule ends."""
    warmup_lr: Float | None = -1.0
    """Learning rate of the first step; negative or null: `init_lr`, no ramp."""
    warmup_steps: NonNegativeInt = 0
    """Length of the warm-up, iterations; one longer than an epoch starts again with each epoch."""
    warmup_ratio: Annotated[NonNegativeFloat, Lt(1)] = 0.0
    """New. Length of the warm-up of `cosine_lr`, a share of all updates, rounded up; the first has the rate 0."""
    lr_decay_rate: Annotated[PositiveFloat, Le(1)] | None = None
    """Factor on the rate per epoch, for `linear_warmup_step_lr`; null: 1."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's decay of matrices; biases and other 1-D parameters have none."""
    beta2: Annotated[PositiveFloat, Lt(1)] = 0.999
    """AdamW's second beta; the first is 0.9."""

    max_epoch: PositiveInt | None = None
    """Epochs to train; needed to train."""
    iters_per_epoch: PositiveInt | None = None
    """Iterations (micro-batches) of an epoch, whatever the size of the data; needed to train."""
    accum_grad_iters: PositiveInt = 1
    """Gradient-accumulation steps."""
    accum_loss: Literal["mean", "sum", "mean_of_means"] = "mean"
    """New. `mean` over the supervised tokens of all iterations and ranks of an update; `sum` of the iterations' means,
    as published; `mean_of_means`, as in LLaVA."""
    max_grad_norm: PositiveFloat | None = None
    """New. Clip the gradient of an update to this norm; null: no clipping, as published."""
    max_nonfinite_steps: PositiveInt = 10
    """New. Updates in a row whose loss or gradient is not finite, or whose answers are all cut off, before the run
    stops; each is skipped."""

    num_workers: Annotated[NonNegativeInt, Le(1_000)] = 4
    """Loader processes per GPU and dataset; 0 loads in the main process."""
    batch_size_train: BatchSize | None = None
    """Training batch per GPU of datasets that set no `batch_size` themselves."""
    batch_size_eval: BatchSize | None = None
    """Evaluation batch per GPU; null: the training batch."""
    seed: NonNegativeInt = 42
    """Seed of everything random; the rank is added to it."""

    amp: bool = False
    """Automatic mixed precision in training."""
    amp_dtype: Literal["fp16", "bf16"] = "fp16"
    """Precision under `amp`; fp16 comes with a gradient scaler."""
    compile: bool = False
    """New. torch.compile on norms, MLPs and the vision side's blocks: faster steps after a slower first one."""
    feature_cache: Annotated[str | None, PathTo("dir", later=True)] = None
    """New. Folder that keeps the frozen vision side's features of each image; null: encoded each time."""

    output_dir: Annotated[str, PathTo("dir", later=True)] = "output"
    """Folder of runs; each makes a folder of its own in it, named by its job id."""
    save_every_iters: PositiveInt | None = None
    """New. Also save a checkpoint after each so many iterations; null: at the end of each epoch only."""
    keep_last: PositiveInt | None = None
    """New. Keep this many checkpoints of `save_every_iters`; those of epochs and the best stay. Null: all."""
    resume_ckpt_path: Annotated[str | None, PathTo("checkpoint")] = None
    """Checkpoint to resume exactly; `auto`: the newest whole one of this job in `output_dir`, else from scratch."""

    max_bad_share: Annotated[NonNegativeFloat, Le(1)] = 0.01
    """New. Share of samples that may be unreadable before the run stops."""
    max_bad_in_a_row: PositiveInt = 100
    """New. Unreadable samples in a row before the run stops."""

    evaluate: bool = False
    """Evaluate `resume_ckpt_path`, else `model.ckpt`, on `test_splits` and do not train."""
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Dataset splits to train on."""
    valid_splits: list[str] = field(default_factory=list)
    """Splits to evaluate after each epoch."""
    valid_captions: NonNegativeInt = 0
    """New. Images of each split to caption and score (BLEU, CIDEr, ROUGE-L); 0: two captions are logged, not scored."""
    test_splits: list[str] = field(default_factory=list)
    """Splits to evaluate at the end, on the best epoch where `valid_splits` tell it, or alone with `evaluate`."""

    batch_invariant: bool = False
    """New. Greedy answers, and likelihoods of answers, are the same to the bit in a batch of any size, whatever else is
    in it, however many processes there are; slower (docs/performance.md). Not with sampling."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """New. How captions are decoded in an evaluation, the same for all checkpoints."""
    failure_prompts: FailurePrompts = field(default_factory=FailurePrompts)
    """New. What `eval_scripts/eval_failure_rate.py` asks about every image."""
    advanced_tasks: dict[str, AdvancedTask] = field(default_factory=dict)
    """New. By name, what `eval_scripts/eval_advanced.py` asks about images that name no task themselves."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """New. How `demo.py`'s page begins."""

    device: str = "cuda"
    """`cuda`, `cuda:N`, `cpu`, and never tried: `xpu`, `xpu:N`, `mps`."""
    world_size: PositiveInt = 1
    """Number of processes; torchrun's own number goes before it."""
    dist_url: str = "env://"
    """Where the processes of a distributed run meet; `env://`: as torchrun says."""
    distributed: bool = True
    """Use several processes when the run was launched with several."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """New. `ddp`: each process holds the whole frozen LLM; `fsdp`: its layers are spread over them (torch FSDP2)."""
    use_dist_eval_sampler: bool = True
    """Split evaluation data over the processes; False: each reads all of it."""

    wandb_log: bool = False
    """Log to Weights & Biases too, from rank 0."""
    tensorboard_log: bool = False
    """New. Write TensorBoard event files into the run's folder too, from rank 0."""
    job_name: str = "minigpt4"
    """Name of the run for Weights & Biases."""
    log_freq: PositiveInt = 50
    """Iterations between two lines of the training log."""

    def __post_init__(self) -> None:
        is_above = self.init_lr is not None and self.min_lr > self.init_lr
        refuse(
            (is_above, f"min_lr: {self.min_lr} must be at most init_lr ({self.init_lr})"),
            (not DEVICE.fullmatch(self.device), f"device: {self.device!r:.200} must be cuda, cuda:N, xpu, mps or cpu"),
        )

    def splits(self) -> list[str]:
        """Every split that the run reads, once."""
        before = [] if self.evaluate else [*self.train_splits, *self.valid_splits]
        return list(dict.fromkeys([*before, *self.test_splits]))

    def training_faults(self) -> Iterator[str]:
        if not self.evaluate:
            missing = [key for key in TRAINING_KEYS if getattr(self, key) is None]
            yield from (f"run.{key}: needed to train; set evaluate: True to evaluate only" for key in missing)
