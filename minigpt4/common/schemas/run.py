"""Schema of the YAML section `run:`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from minigpt4.common.errors import ConfigError
from minigpt4.common.schemas.checks import at_least, batch_sizes, require
from minigpt4.common.schemas.failure_prompts import FailurePrompts
from minigpt4.common.schemas.generation import GenerationSettings

DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
MOST_WORKERS = 1_000
TRAINING_KEYS = ("init_lr", "max_epoch", "iters_per_epoch")


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
    """Iterations whose gradients make one optimizer step."""

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
        self._check_rates()

    def _check_rates(self) -> None:
        if self.init_lr is None:
            return
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
