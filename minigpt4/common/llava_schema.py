"""Schema of the YAML section `model:` for `arch: llava`: MiniGPT-4's keys with LLaVA's defaults, and a few of its own.

They have the names of the published code where they mean the same; `vit_layer` is its `mm_vision_select_layer`,
`projection` its `mm_projector_type`, `conv_template` its `--version`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from minigpt4.common.binding import Int, PositiveInt, refuse
from minigpt4.common.model_schema import Channels, MiniGPT4Config

IMAGE_TOKENS = {"mm_use_im_patch_token": ("<im_patch>",), "mm_use_im_start_end": ("<im_start>", "<im_end>")}
"""Tokens by the key that adds them, in the order of their ids."""

PUBLISHED_NAMES = {
    "model_name_or_path": "llama_model",
    "pretrain_mm_mlp_adapter": "ckpt",
    "vision_tower": "vit_model",
    "mm_vision_tower": "vit_model",
    "mm_vision_select_layer": "vit_layer",
    "mm_vision_select_feature": "vit_prefix",
    "mm_projector_type": "projection",
    "mm_projector_lr": "train.projection.lr",
    "version": "conv_template",
    "conv_mode": "conv_template",
    "model_max_length": "tokenizer_model_max_length",
    "lora_enable": "train.llm.rule: lora",
}
"""Of the published code's options and config.json: where the same is said here."""


@dataclass
class LlavaConfig(MiniGPT4Config):
    """What `VisionLanguageModel.from_config` reads for LLaVA; `llama_model` must be set."""

    REFUSED_KEYS: ClassVar[Mapping[str, str]] = {
        **MiniGPT4Config.REFUSED_KEYS,
        **{key: f"it is called {own} here" for key, own in PUBLISHED_NAMES.items()},
        "mm_patch_merge_type": "is of LLaVA 1.6, which sees an image in tiles; v1 and 1.5 are read",
    }
    PLACEHOLDER: ClassVar[str] = "<image>"
    IMAGE_PROCESSOR: ClassVar[str] = "clip_image"
    TOKENIZER: ClassVar[Mapping[str, bool]] = {"published": False}
    BEAMS_COUNT_BOS: ClassVar[bool] = False

    arch: str = "llava"
    """Registered name of the model class."""
    model_type: str | None = None
    """Packaged default YAML under the user's file: `v1` (224 px, linear) or `v1.5` (336 px, two layers)."""
    vit_model: str = "weights/clip-vit-large-patch14"
    """Directory of a CLIP model as transformers saves it, or what else MiniGPT-4's key takes."""
    vit_layer: Int = -2
    """Layer whose tokens are read, -1 the last, 1 the first, 0 what it reads; no norm follows."""
    vit_precision: Literal["fp16", "bf16", "fp32"] = "bf16"
    """Of the frozen vision tower."""
    connector: Literal["qformer", "join4", "join2x2", "identity"] | None = "identity"
    """`identity`: each patch is an image token."""
    llm_precision: Literal["fp16", "bf16", "fp32", "int8", "nf4"] = "bf16"
    """Storage of the LLM."""
    max_txt_len: Channels = 2048
    """Longest answer of samples that are no `conversations`, tokens."""

    conv_template: Literal[
        *("plain", "v0_plain", "v0", "default", "v1", "vicuna_v1", "llava_v0", "llava_v1"),
        *("llava_llama_2", "llama_2", "v0_mmtag", "v1_mmtag", "mpt", "chatml_direct"),
    ] = "v1"
    """What stands around questions and answers: `plain` in stage 1, `v1` (Vicuna), `llava_v0` (the paper),
    `llava_llama_2`, or `chatml_direct` (LLMs with `<|im_end|>`). Sets `prompt_template` and `end_sym`."""
    reference_masks: bool = False
    """As published, a conversation with a "tokenization mismatch" trains nothing, `<unk>` in a text is padding, `plain`
    and v0 take any role, and an image without placeholder is left out; False trains its answers, or refuses it."""
    tokenizer_model_max_length: PositiveInt = 2048
    """Longest sequence in training, text and image tokens together; cut on the right."""
    tokenizer_padding_side: Literal["right", "left"] = "right"
    """Where shorter sequences of a training batch are filled up; `left` means `llm_packing: False`."""
    mm_use_im_start_end: bool = False
    """Put `<im_start>` and `<im_end>` around images: new tokens, at first the mean of all."""
    mm_use_im_patch_token: bool = False
    """Add the token `<im_patch>`, which no text uses."""
    image_aspect_ratio: Literal["square", "pad"] = "square"
    """Of image processors that do not say it: `square` cuts out the centre, `pad` fills up to a square."""

    def __post_init__(self) -> None:
        from minigpt4.conversation.llava import LLAVA_TEMPLATES, single_turn  # a layer above, but no more than texts

        own = (single_turn(self.conv_template), LLAVA_TEMPLATES[self.conv_template].end)
        refuse(
            (self.prompt_template not in ("", own[0]), "prompt_template: conv_template says it; leave it out"),
            (self.reference_masks and own[1] == "<|im_end|>", "reference_masks: not with ChatML templates"),
            (self.end_sym not in ("\n", own[1]), "end_sym: conv_template says it; leave it out"),
        )
        self.prompt_template, self.end_sym = own
        if self.tokenizer_padding_side == "left":
            self.llm_packing = False
        super().__post_init__()

    def as_read(self, prompt: str) -> str:
        """With `<image>`, the tags of template and tokenizer around it, in the places of images."""
        from minigpt4.conversation.llava import LLAVA_TEMPLATES, as_llava

        opening, closing = LLAVA_TEMPLATES[self.conv_template].tags
        if self.mm_use_im_start_end:
            opening, closing = f"{opening}<im_start>", f"<im_end>{closing}"
        return as_llava(prompt, f"{opening}{self.PLACEHOLDER}{closing}")

    @property
    def new_tokens(self) -> list[str]:
        """What the vocabulary of the LLM is to have besides its own."""
        return [token for key, tokens in IMAGE_TOKENS.items() if getattr(self, key) for token in tokens]
