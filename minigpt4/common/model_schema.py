"""Schema of the YAML section `model:` for `arch: minigpt4`.

The published keys keep their published meaning and default; the keys of this project are marked "New.".
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Lt
from pydantic import AfterValidator, model_validator
from typing_extensions import TypedDict

from minigpt4.common.binding import (
    Float,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PathTo,
    PositiveFloat,
    PositiveInt,
    refuse,
)
from minigpt4.common.errors import ConfigError
from minigpt4.common.hub import WEIGHTS, local_path

EVA_CLIP_G = "eva_clip_g"
VIT_FILE = "eva_vit_g.pth"
QFORMER_FILE = "blip2_pretrained_flant5xxl.pth"

# Far above what any model has; a slip of the keyboard must not fill the memory.
Layers = Annotated[PositiveInt, Le(1_000)]
Channels = Annotated[PositiveInt, Le(100_000)]
Ratio = Annotated[PositiveFloat, Le(100_000), AfterValidator(lambda ratio: int(ratio) if ratio.is_integer() else ratio)]
FilePath = Annotated[str | None, PathTo("file")]
WeightsPath = Annotated[str | None, PathTo("file", hub=True)]
"""A file here, or `hf:owner/name/file` on the Hugging Face Hub."""
_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")


def mlp_depth(projection: str) -> int | None:
    """N of `mlpNx_gelu`, None for another name."""
    found = _MLP.fullmatch(projection)
    return int(found[1]) if found else None


def _projection(name: str) -> str:
    if name not in ("linear", "linear3", "identity") and mlp_depth(name) is None:
        raise ValueError("must be linear, linear3, identity or mlpNx_gelu with N from 1 to 99, such as mlp2x_gelu")
    return name


class VitSizes(TypedDict, total=False):
    """Overrides of the ViT's sizes."""

    embed_dim: Channels
    depth: Layers
    num_heads: Channels
    patch_size: Channels
    mlp_ratio: Ratio


class QFormerSizes(TypedDict, total=False):
    """Overrides of the Q-Former's sizes."""

    hidden_size: Channels
    num_hidden_layers: Layers
    num_attention_heads: Channels
    intermediate_size: Channels
    cross_attention_frequency: Channels


@dataclass
class TrainRule:
    """What is trained of one part. The rule alone may stand for it: `llm: full`."""

    rule: Literal["frozen", "full", "last", "head", "lora", "qlora"] | None = None
    """`frozen`; `full`: all of it; `last`: its last `blocks`; `head`: of the LLM its output layer; `lora`: adapters
    beside its linear layers; `qlora`: the same on an LLM in `nf4`, or `int8` if `llm_precision` says so. Null: trained
    is the projection alone, and what `freeze_vit`, `freeze_qformer` and `lora_r` say."""
    blocks: Layers | None = None
    """Of `last`: how many; nothing before, between or behind them is trained."""
    lr: PositiveFloat | None = None
    """Learning rate in the place of `run.init_lr`; the schedule scales it alike. Null: `run.init_lr`."""
    weight_decay: NonNegativeFloat | None = None
    """In the place of `run.weight_decay`; null: that."""
    r: Annotated[PositiveInt, Le(10_000)] = 64
    """Of `lora`: rank of the adapters."""
    alpha: PositiveFloat = 16.0
    """Of `lora`: adapters count alpha / r."""
    dropout: Annotated[Float, Ge(0), Lt(1)] = 0.05
    """Of `lora`: of what the adapters read, in training."""
    target_modules: list[str] | None = None
    """Of `lora`: ends of the names of linear layers; null: all of the part's but the LLM's output layer."""

    @model_validator(mode="before")
    @classmethod
    def read_short_form(cls, values: Any) -> Any:
        """`full` is `{rule: full}`."""
        return {"rule": values} if isinstance(values, str) else values

    def __post_init__(self) -> None:
        adapters = (self.r, self.alpha, self.dropout, self.target_modules) != (64, 16.0, 0.05, None)
        refuse(
            ((self.rule == "last") != (self.blocks is not None), "blocks: goes with rule: last, which needs it"),
            (adapters and not self.is_lora, "r: r, alpha, dropout, target_modules go with rule: lora"),
            (self.target_modules == [], "target_modules: is empty"),
        )

    @property
    def is_lora(self) -> bool:
        return self.rule in ("lora", "qlora")

    @property
    def trains_own(self) -> bool:
        """Whether weights of the part itself are trained."""
        return self.rule in ("full", "last", "head")


@dataclass
class TrainRules:
    """`model.train`: a rule for each part."""

    vision: TrainRule = field(default_factory=TrainRule)
    """Vision encoder and `ln_vision`, which only `full` trains."""
    connector: TrainRule = field(default_factory=TrainRule)
    """Q-Former and query tokens, which only `full` trains."""
    projection: TrainRule = field(default_factory=TrainRule)
    """Between vision and LLM: `full` or `frozen`."""
    llm: TrainRule = field(default_factory=TrainRule)
    """`full`: embeddings and output layer, too, as in LLaVA; with `last` they stay."""


PARTS = {
    "visual_encoder": "vision",
    "ln_vision": "vision",
    "Qformer": "connector",
    "query_tokens": "connector",
    "llama_proj": "projection",
    "llama_model": "llm",
}
"""The field of `TrainRules` that speaks of a module, by the beginning of its weights' names."""


@dataclass
class MiniGPT4Config:
    """What `MiniGPT4.from_config` reads; `llama_model` is the only key without a usable default."""

    REFUSED_KEYS: ClassVar[Mapping[str, str]] = {
        "prompt": "has no effect in MiniGPT-4; use prompt_path (a file of instructions)",
    }
    PLACEHOLDER: ClassVar[str] = "<ImageHere>"
    """What stands for an image in the prompts of the published code."""
    IMAGE_PROCESSOR: ClassVar[str] = "blip2_image"
    """What stands before `_train` and `_eval` in the names of the processors where a section names none."""
    TOKENIZER: ClassVar[Mapping[str, bool]] = {}
    """Arguments of `load_tokenizer`."""
    BEAMS_COUNT_BOS: ClassVar[bool] = True
    """Whether the length of a beam counts the bos token of its output."""
    new_tokens: ClassVar[Sequence[str]] = ()
    """What the vocabulary of the LLM is to have besides its own."""

    arch: str = "minigpt4"
    """Registered name of the model class."""
    model_type: str | None = None
    """Packaged default YAML under the user's file: `pretrain_vicuna0` or `pretrain_llama2`."""

    image_size: Channels | None = None
    """Side of the square input image, pixels; null: the vision encoder's own, 224 for `eva_clip_g`."""
    vit_model: str = EVA_CLIP_G
    """`eva_clip_g` (BLIP-2's, without its 40th block), a timm model name, or a directory with CLIP or SigLIP, also by
    its name on the Hugging Face Hub."""
    vit_layer: Annotated[Int, Le(-1)] = -1
    """New. Layer whose tokens are read: -1 the last, as the encoder gives it; -2, as in LLaVA, without a norm."""
    vit_prefix: Literal["keep", "drop"] | None = None
    """New. What becomes of the class token; null: a Q-Former reads it, other connectors leave it out."""
    vit_weights: WeightsPath = None
    """New. `eva_vit_g.pth`; unset: that name in `weights/` or torch's download cache, as in the original code."""
    vit_config: VitSizes = field(default_factory=dict)
    """New. Overrides of the ViT's sizes."""
    vit_precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of the frozen vision encoder and Q-Former, but LayerNorms and embeddings; trained parts are stored in fp32."""
    vit_cuda_graph: bool = False
    """New. On a GPU, launch the frozen vision side as one CUDA graph for each batch size that comes often: the host has
    less to do, and the working memory of the vision side is not shared with the LLM's."""
    drop_path_rate: Annotated[Float, Ge(0), Lt(1)] = 0.0
    """Stochastic depth of the ViT, 0 to 1; acts only while the ViT is trained."""
    use_grad_checkpoint: bool = False
    """Recompute the ViT's activations in the backward pass; acts only while the ViT is trained."""
    freeze_vit: bool = True
    """Keep the vision encoder and `ln_vision` as loaded."""

    has_qformer: bool = True
    """False: the ablation without Q-Former; the published name of `connector: join4`."""
    connector: Literal["qformer", "join4", "join2x2", "identity"] | None = None
    """New. From vision to image tokens: `qformer`; `join4`, four neighbouring patches joined, as in the released
    LLaMA-2 model; `join2x2`, squares of patches; `identity`, each patch, as in LLaVA. Null: as `has_qformer` says."""
    q_former_model: WeightsPath = None
    """BLIP-2 weights (Q-Former, query tokens, `ln_vision`): path, or the published URL, looked up by its file name."""
    qformer_config: QFormerSizes = field(default_factory=dict)
    """New. Overrides of the Q-Former's sizes."""
    num_query_token: Channels = 32
    """Learned queries of the Q-Former = image tokens that the LLM reads."""
    freeze_qformer: bool = True
    """Keep Q-Former and query tokens as loaded; False trains them beside the projection."""

    proj_layers: Literal[1, 3] = 1
    """New. Linear layers between vision and LLM: 1 (published) or 3 (the paper's ablation)."""
    projection: Annotated[str, AfterValidator(_projection)] | None = None
    """New. Between vision and LLM: `linear`, `linear3`, LLaVA 1.5's `mlp2x_gelu` (`mlpNx_gelu` has N layers), or
    `identity`; null: as `proj_layers` says."""

    train: TrainRules = field(default_factory=TrainRules)
    """New. What is trained, part by part, with which learning rate."""
    lora_r: Int = 0
    """Above 0 the published form of `train: {llm: {rule: lora, r: ...}}`, with the three keys below."""
    lora_alpha: PositiveFloat = 16.0
    lora_dropout: Annotated[Float, Ge(0), Lt(1)] = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    llama_model: Annotated[str | None, PathTo("dir", hub=True)] = None
    """Directory of the LLM: Vicuna, LLaMA-2-chat or any causal LM that transformers loads; or its name on the Hugging
    Face Hub, `lmsys/vicuna-7b-v1.5`, with `@` and a revision behind it if it is not the newest."""
    llm_precision: Literal["fp16", "bf16", "fp32", "int8", "nf4"] = "fp16"
    """New. Storage of the LLM: `fp16`, `bf16`, `fp32`, or `int8` and `nf4` (bitsandbytes, CUDA). For training take
    `nf4`: `int8` waits for the GPU in every linear layer. `nf4` computes in bf16 where `vit_precision` is `bf16`, else
    in fp16, as `int8` does. Trained itself (`full`, `last`) it is `fp32`, master weights that `run.amp` computes with
    in 16 bits, or `bf16` throughout, where small updates are lost."""
    low_resource: bool = False
    """Load the LLM in 8 bits; the published name of `llm_precision: int8`."""
    device_8bit: NonNegativeInt = 0
    """CUDA device of a quantised LLM when the caller names no device."""

    llm_attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """New. The LLM's attention in transformers; null: fused kernel on GPUs, matrix products on CPUs, both unpadded."""
    llm_packing: bool = True
    """New. A training step computes nothing for padding; with `llm_attention: null` and LLaMA-like LLMs.
    Without it transformers looks at the mask, for which each forward waits for the GPU."""
    llm_prefix_cache: bool = True
    """New. The text before the image, the same in each step, is read by the frozen LLM once; with `llm_packing`."""
    llm_logits: Literal["targets", "all"] = "targets"
    """New. Positions whose logits a training step computes: `targets` only, or `all`, as in the original; same loss."""
    llm_grad_checkpoint: bool = False
    """New. Recompute the LLM's activations in the backward pass: less memory, about a third more time."""
    llm_cuda_graph: bool = False
    """New. On a GPU, read an answer's tokens by a CUDA graph; with `llm_attention: null` and LLaMA-like LLMs. In 16
    bits its numbers may round differently, as in a batch of another size."""
    llm_sanity_check: bool = True
    """New. Let the LLM read one English sentence after loading; a loss near ln(vocabulary) stops the run."""

    ckpt: WeightsPath = None
    """Checkpoint with the trained weights (`llama_proj.*` in the published files)."""
    ckpt_allow_keys: list[str] = field(default_factory=list)
    """New. Shell patterns of checkpoint keys that may be missing or left over; others are errors."""
    ckpt_any_llm: bool = False
    """New. Load a checkpoint although its card says that it was trained with another LLM."""
    ckpt_any_vision: bool = False
    """New. Load a checkpoint although its card says that it was trained with other weights of the vision side."""

    prompt_path: FilePath = None
    """Text file with one training instruction a line; lines without `<ImageHere>` are dropped."""
    prompt_template: str = ""
    """Chat format around an instruction, with one `{}`; '': as it is; `tokenizer`: its own chat template."""
    chat_template: bool = False
    """Put `instruction_input` of a sample into `prompt_template` too."""

    max_txt_len: Channels = 32
    """Longest answer in training, tokens, end symbol included."""
    max_context_len: PositiveInt = 3800
    """Longest prompt in training, tokens and image embeddings together; cut on the right."""
    end_sym: str = "\n"
    """What ends an answer in training and is therefore what the model learns to stop with."""
    truncate_end_sym: bool = False
    """New. True: a too long answer loses its end symbol, as in the published code; False keeps it."""

    def __post_init__(self) -> None:
        three = self.proj_layers == 3
        self.connector = self.connector or ("qformer" if self.has_qformer else "join4")
        self.projection = self.projection or ("linear3" if three else "linear")
        reads_prefix = self.connector == "qformer"
        template = f"{self.prompt_template[:200]!r} must hold exactly one {{}}, other braces doubled"
        refuse(
            (reads_prefix and not self.has_qformer, "connector: qformer does not go with has_qformer: False"),
            (reads_prefix and self.vit_prefix == "drop", "vit_prefix: drop does not go with a Q-Former"),
            (three and self.projection != "linear3", f"projection: {self.projection} does not go with proj_layers: 3"),
            (self.llm_cuda_graph and self.llm_storage == "int8", "llm_cuda_graph: int8 waits for the GPU; take nf4"),
            (self.low_resource and self.llm_precision == "nf4", "low_resource: means int8, llm_precision says nf4"),
            (not is_template(self.prompt_template), f"prompt_template: {template}"),
        )
        self.has_qformer = reads_prefix
        self._settle_rules()
        if self.image_size is None and self.vit_model == EVA_CLIP_G:
            self.image_size = 224

    def llm_directory(self, weights: Sequence[str] = WEIGHTS) -> Path:
        """Where the LLM is, fetched from the hub if it has to be, as `local_path` says; ConfigError if `llama_model` is
        not set."""
        if not self.llama_model:
            raise ConfigError("model.llama_model: not set; it must be the directory of the LLM")
        return local_path(self.llama_model, "model.llama_model", weights)

    def as_read(self, prompt: str) -> str:
        """A whole prompt of this program as the model reads it."""
        return prompt

    def _settle_rules(self) -> None:
        """The published keys into `train`, whose rules are never null from here on; the keys then say the same."""
        rules, projection = self.train, self.train.projection.rule
        instead, of_vision = {"qlora": "lora", "head": "last"}, []
        for part, key in (("vision", "freeze_vit"), ("connector", "freeze_qformer")):
            rule = getattr(rules, part).rule
            of_vision += [
                (rule == "frozen" and not getattr(self, key), f"train.{part}: frozen, but {key}: False"),
                (rule in instead, f"train.{part}: {rule} is for the LLM; take {instead.get(rule)}"),
            ]
        refuse(
            *of_vision,
            (self.lora_r > 0 and rules.llm.rule, "lora_r: cannot stand beside train.llm; set one or the other"),
            (projection not in (None, "full", "frozen"), f"train.projection.rule: {projection!r}: only full or frozen"),
        )
        if self.lora_r > 0:
            own = {"r": self.lora_r, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
            rules.llm = replace(rules.llm, rule="lora", target_modules=self.lora_target_modules, **own)
            self.lora_r = 0  # said; a copy of this section does not say it again
        rules.vision.rule = rules.vision.rule or ("frozen" if self.freeze_vit else "full")
        rules.connector.rule = rules.connector.rule or ("frozen" if self.freeze_qformer else "full")
        rules.projection.rule = rules.projection.rule or "full"
        rules.llm.rule = rules.llm.rule or "frozen"
        self.freeze_vit, self.freeze_qformer = (rule.rule == "frozen" for rule in (rules.vision, rules.connector))
        if rules.llm.rule == "qlora" and self.llm_storage not in ("int8", "nf4"):
            self.llm_precision = "nf4"
        graph = "vit_cuda_graph: True needs a frozen vision side (freeze_vit, freeze_qformer)"
        is_frozen = self.freeze_vit and self.freeze_qformer
        is_narrow = rules.llm.trains_own and self.llm_storage not in ("fp32", "bf16")
        precision = f"llm_precision: {self.llm_storage}; set it to fp32 (master weights) or bf16"
        frozen = {name: (rule.lr, rule.weight_decay) for name, rule in vars(rules).items() if rule.rule == "frozen"}
        refuse(
            (self.vit_cuda_graph and not is_frozen, graph),
            (is_narrow, f"train.llm: {rules.llm.rule} does not go with {precision}"),
            *((own != (None, None), f"train.{name}.lr: it is frozen") for name, own in frozen.items()),
        )

    def rule_of(self, name: str) -> TrainRule:
        """The rule for a part of the model, such as `visual_encoder` or `llama_proj`, or for one of its weights."""
        return getattr(self.train, PARTS[name.partition(".")[0]])

    def is_frozen(self, part: str) -> bool:
        """Whether a part of the model stays as its files have it."""
        return self.rule_of(part).rule == "frozen"

    @property
    def llm_storage(self) -> str:
        """Precision of the stored LLM, `low_resource` included."""
        return "int8" if self.low_resource else self.llm_precision


def is_template(text: str) -> bool:
    """Whether a text can be `prompt_template`: empty, `tokenizer`, or with exactly one `{}`."""
    if text in ("", "tokenizer"):
        return True
    try:  # not tried out: "{:>9999999999}" would fill the memory
        places = [place for _, *place in string.Formatter().parse(text) if place[0] is not None]
    except ValueError:
        return False
    return places == [["", "", None]]
