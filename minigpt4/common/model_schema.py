"""Schema of the YAML section `model:` for `arch: minigpt4`.

The published keys keep their published meaning and default; the keys of this project are marked "new".
Path fields carry `metadata={"path": ...}` so that a missing file is reported before anything loads.
"""

import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minigpt4.common.errors import ConfigError
from minigpt4.common.schemas import at_least, require

VISION_PRECISIONS = ("fp16", "bf16", "fp32")
LLM_PRECISIONS = ("fp16", "bf16", "fp32", "int8", "nf4")
EVA_CLIP_G = "eva_clip_g"
VIT_FILE = "eva_vit_g.pth"
QFORMER_FILE = "blip2_pretrained_flant5xxl.pth"

MOST_LAYERS, MOST_CHANNELS, MOST_TOKENS = 1_000, 100_000, 100_000
"""Far above what any model has; a slip of the keyboard must not fill the memory."""

VIT_OVERRIDES = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")
QFORMER_OVERRIDES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "cross_attention_frequency",
)


def _path(kind: str, default: str | None = None) -> Any:
    return field(default=default, metadata={"path": kind})


@dataclass
class MiniGPT4Config:
    """What `MiniGPT4.from_config` reads; `llama_model` is the only key without a usable default."""

    arch: str = "minigpt4"
    """Registered name of the model class."""

    model_type: str | None = None
    """Packaged default YAML under the user's file: `pretrain_vicuna0` or `pretrain_llama2`."""

    image_size: int | None = None
    """Side of the square input image, pixels; a multiple of the patch size. Null: the vision encoder's own, 224 for
    `eva_clip_g`."""

    vit_model: str = EVA_CLIP_G
    """`eva_clip_g` (BLIP-2's EVA-CLIP ViT-g/14 without its 40th block), any timm model name, or the directory of a CLIP
    or SigLIP model as transformers saves it."""

    vit_layer: int = -1
    """New. Layer of the ViT whose tokens are read: -1 the last, as the encoder gives it; -2 the one before, as in
    LLaVA, without a norm after it."""

    vit_prefix: Literal["keep", "drop"] | None = None
    """New. What becomes of the class token; null: a Q-Former reads it, other connectors leave it out."""

    vit_weights: str | None = _path("file")
    """New. File of the vision encoder's weights (`eva_vit_g.pth`); unset: that name in `weights/` or torch's
    download cache, where the original code kept it."""

    vit_config: dict[str, int | float] = field(default_factory=dict)
    """New. Overrides of the ViT's sizes: `embed_dim`, `depth`, `num_heads`, `patch_size`, `mlp_ratio`."""

    vit_precision: str = "fp16"
    """Storage and compute of the frozen vision encoder and Q-Former: `fp16`, `bf16` or `fp32`. LayerNorms and
    embeddings stay fp32, as in the original; a part that is trained is stored in fp32 and follows `run.amp`."""

    drop_path_rate: float = 0.0
    """Stochastic depth of the ViT, 0 to 1; acts only while the ViT is trained."""

    use_grad_checkpoint: bool = False
    """Recompute the ViT's activations in the backward pass; acts only while the ViT is trained."""

    freeze_vit: bool = True
    """Keep the vision encoder and `ln_vision` as loaded."""

    has_qformer: bool = True
    """False: the ablation without Q-Former; the published name of `connector: join4`."""

    connector: Literal["qformer", "join4", "join2x2", "identity"] | None = None
    """New. What makes image tokens of vision tokens: `qformer`; `join4`, four neighbouring patches joined into one, as
    in the released LLaMA-2 model; `join2x2`, squares of patches; `identity`, each patch, as in LLaVA. Null: as
    `has_qformer` says."""

    q_former_model: str | None = _path("file")
    """File of the BLIP-2 weights (Q-Former, query tokens, `ln_vision`): path or the published URL, which
    is looked up by its file name like `vit_weights`."""

    qformer_config: dict[str, int] = field(default_factory=dict)
    """New. Overrides of the Q-Former's sizes: `hidden_size`, `num_hidden_layers`, `num_attention_heads`,
    `intermediate_size`, `cross_attention_frequency`."""

    num_query_token: int = 32
    """Learned queries of the Q-Former = image tokens that the LLM reads."""

    freeze_qformer: bool = True
    """Keep Q-Former and query tokens as loaded; False trains them beside the projection."""

    proj_layers: int = 1
    """New. Linear layers between vision and LLM: 1 (published) or 3 (the paper's ablation)."""

    projection: Literal["linear", "linear3", "mlp2x_gelu"] | None = None
    """New. What is between vision and LLM: `linear`, `linear3`, or LLaVA 1.5's `mlp2x_gelu`. Null: as `proj_layers`
    says."""

    llama_model: str | None = _path("dir")
    """Local directory of the frozen LLM: Vicuna, LLaMA-2-chat or any causal LM that transformers loads."""

    llm_precision: str = "fp16"
    """New. Storage of the frozen LLM: `fp16`, `bf16`, `fp32`, or `int8` and `nf4` (bitsandbytes, CUDA)."""

    low_resource: bool = False
    """Load the LLM in 8 bits; the published name of `llm_precision: int8`."""

    device_8bit: int = 0
    """CUDA device of a quantised LLM when the caller names no device."""

    llm_attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """New. The LLM's attention code, one of transformers; null: the fused kernel on GPUs and matrix products on CPUs,
    both without padding."""

    llm_packing: bool = True
    """New. A training step computes nothing for padding; with `llm_attention: null` and LLaMA-like LLMs."""

    llm_prefix_cache: bool = True
    """New. The text before the image, the same in each step, is read by the frozen LLM once; with `llm_packing`."""

    llm_logits: Literal["targets", "all"] = "targets"
    """New. Positions whose logits a training step computes: `targets` only, or `all`, as the original does; the loss
    is the same."""

    llm_grad_checkpoint: bool = False
    """New. Recompute the LLM's activations in the backward pass: less memory, about a third more time."""

    llm_sanity_check: bool = True
    """New. Let the LLM read one English sentence after loading; a loss near ln(vocabulary) stops the run."""

    ckpt: str | None = _path("file")
    """Checkpoint with the trained weights (`llama_proj.*` in the published files)."""

    ckpt_allow_keys: list[str] = field(default_factory=list)
    """New. Shell patterns of checkpoint keys that may be missing or left over; others are errors."""

    ckpt_any_llm: bool = False
    """New. Load a checkpoint although its card says that it was trained with another LLM."""

    ckpt_any_vision: bool = False
    """New. Load a checkpoint although its card says that it was trained with other weights of the vision side."""

    prompt: str = ""
    """Published and without effect there; only the empty string is accepted."""

    prompt_path: str | None = _path("file")
    """Text file with one training instruction a line; lines without `<ImageHere>` are dropped."""

    prompt_template: str = ""
    """Chat format around an instruction, with one `{}`; '' leaves it as it is; `tokenizer` takes the chat
    template that comes with the LLM's tokenizer."""

    chat_template: bool = False
    """Put `instruction_input` of a sample into `prompt_template` too."""

    max_txt_len: int = 32
    """Longest answer in training, tokens, end symbol included."""

    max_context_len: int = 3800
    """Longest prompt in training, tokens and image embeddings together; cut on the right."""

    end_sym: str = "\n"
    """What ends an answer in training and is therefore what the model learns to stop with."""

    truncate_end_sym: bool = False
    """New. True: a too long answer loses its end symbol, as in the published code; False keeps it."""

    lora_r: int = 0
    """Published in MiniGPT-v2; LoRA is not part of this project yet: only 0 is accepted."""

    lora_alpha: int = 16
    """Read with `lora_r` only."""

    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Read with `lora_r` only."""

    lora_dropout: float = 0.05
    """Read with `lora_r` only."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._settle_parts()
        self._check_ranges()
        self._check_overrides()
        self._check_template()
        if self.lora_r > 0:
            raise ValueError("lora_r: LoRA on the LLM does not exist here yet; set lora_r: 0")
        if self.prompt:
            raise ValueError("prompt: has no effect in MiniGPT-4; use prompt_path (a file of instructions)")

    def _check_choices(self) -> None:
        for key, choices in (
            ("vit_precision", VISION_PRECISIONS),
            ("llm_precision", LLM_PRECISIONS),
            ("proj_layers", (1, 3)),
        ):
            value = getattr(self, key)
            if value not in choices:
                raise ValueError(f"{key}: {value!r} is not one of {', '.join(map(str, choices))}")
        if self.low_resource and self.llm_precision == "nf4":
            raise ValueError("low_resource means int8, but llm_precision says nf4; set one of them")

    def _settle_parts(self) -> None:
        """Old and new keys of a part say the same afterwards."""
        if self.connector is None:
            self.connector = "qformer" if self.has_qformer else "join4"
        elif self.connector == "qformer" and not self.has_qformer:
            raise ValueError("connector: qformer does not go with has_qformer: False; set one of them")
        self.has_qformer = self.connector == "qformer"
        if self.has_qformer and self.vit_prefix == "drop":
            raise ValueError("vit_prefix: drop does not go with a Q-Former, which reads the class token")
        if self.projection is None:
            self.projection = {1: "linear", 3: "linear3"}[self.proj_layers]
        elif self.proj_layers == 3 and self.projection != "linear3":
            raise ValueError(f"projection: {self.projection} does not go with proj_layers: 3; set one of them")
        if self.image_size is None and self.vit_model == EVA_CLIP_G:
            self.image_size = 224
        if self.vit_layer >= 0:
            raise ValueError(f"vit_layer: {self.vit_layer} must be -1 (the last layer) or less")

    def _check_ranges(self) -> None:
        for key in ("image_size", "num_query_token", "max_txt_len"):
            value = getattr(self, key)
            require(value is None or 1 <= value <= MOST_TOKENS, key, value, f"from 1 to {MOST_TOKENS:,}")
        at_least(self, 1, "max_context_len")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: {self.drop_path_rate} must be in [0, 1)")
        if self.device_8bit < 0:
            raise ValueError(f"device_8bit: {self.device_8bit} must be a CUDA device number")

    def _check_overrides(self) -> None:
        for key, known in (("vit_config", VIT_OVERRIDES), ("qformer_config", QFORMER_OVERRIDES)):
            unknown = sorted(set(getattr(self, key)) - set(known))
            if unknown:
                raise ValueError(f"{key}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
            for name, value in getattr(self, key).items():
                if value <= 0 or (name != "mlp_ratio" and value != int(value)):
                    raise ValueError(f"{key}: {name}: {value} must be a whole number above 0 (mlp_ratio: any above 0)")
                highest = MOST_LAYERS if name in ("depth", "num_hidden_layers") else MOST_CHANNELS
                if value > highest:
                    raise ValueError(f"{key}: {name}: {value} must be at most {highest:,}")

    def _check_template(self) -> None:
        if self.prompt_template in ("", "tokenizer"):
            return
        # Not tried out: "{:>9999999999}" would fill the memory.
        try:
            fields = [field for _, *field in string.Formatter().parse(self.prompt_template) if field[0] is not None]
        except ValueError:
            fields = []
        if fields != [["", "", None]]:
            raise ValueError(
                f"prompt_template: {self.prompt_template[:200]!r} must hold exactly one {{}}, other braces doubled"
            )

    def llm_directory(self) -> Path:
        """Where the LLM is; ConfigError if `llama_model` is not set."""
        if not self.llama_model:
            raise ConfigError("model.llama_model: not set; it must be the directory of the frozen LLM")
        return Path(self.llama_model).expanduser()

    def is_frozen(self, part: str) -> bool:
        """Whether a part of the model (`visual_encoder`, `ln_vision`, `Qformer`, `llama_proj`, `llama_model`) stays as
        its files have it."""
        frozen = {
            "visual_encoder": self.freeze_vit,
            "ln_vision": self.freeze_vit,
            "Qformer": self.freeze_qformer,
            "llama_model": True,
        }
        return frozen.get(part, False)

    @property
    def llm_storage(self) -> str:
        """Precision that the LLM is stored in, with `low_resource` taken into account."""
        return "int8" if self.low_resource else self.llm_precision
