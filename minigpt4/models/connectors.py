"""The Q-Former: transformers' `Blip2QFormerModel`, read and written under LAVIS's parameter names.

Only the query branch is built; the text branch of `blip2_pretrained_flant5xxl.pth` is left in the file.
Shapes: B images, N vision tokens of width V, Q queries of width H.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from minigpt4.common.checkpoint import copy_strict
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config

# LAVIS name <-> transformers name of the same module.
_RENAMES = (
    ("embeddings.LayerNorm.", "layernorm."),
    (".attention.self.", ".attention.attention."),
    (".crossattention.self.", ".crossattention.attention."),
)
_PREFIX = "Qformer.bert."
# Modules that LAVIS keeps beside the query branch and that nobody here reads.
_TEXT_BRANCH = re.compile(
    r"Qformer\.(cls\.|bert\.embeddings\.(word_embeddings|position_embeddings|position_ids)"
    r"|bert\.encoder\.layer\.\d+\.(intermediate|output)\.|bert\.pooler\.)"
)
_OURS = ("Qformer.", "query_tokens", "ln_vision.")
_INIT_STD = 0.02


def lavis_name(name: str) -> str:
    """`encoder.layer.0.attention.attention.query.weight` -> `Qformer.bert.encoder.layer.0.attention.self...`."""
    for lavis, here in _RENAMES:
        name = name.replace(here, lavis)
    return _PREFIX + name


class QFormer(nn.Module):
    """Learned queries that read the image: (B, N, V) -> (B, Q, H)."""

    def __init__(self, config: Blip2QFormerConfig, num_query_token: int) -> None:
        super().__init__()
        self.bert = Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=_INIT_STD)
        self.hidden_size: int = config.hidden_size

    def forward(self, tokens_BNV: Tensor) -> Tensor:
        queries_BQH = self.query_tokens.expand(tokens_BNV.shape[0], -1, -1)
        output = self.bert(query_embeds=queries_BQH, encoder_hidden_states=tokens_BNV)
        return output.last_hidden_state

    def lavis_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names of the BLIP-2 file, `query_tokens` first."""
        yield "query_tokens", self.query_tokens
        for name, parameter in self.bert.named_parameters():
            yield lavis_name(name), parameter


def build_qformer(cfg: MiniGPT4Config, vision_width: int) -> QFormer:
    """A Q-Former with fresh weights for vision tokens of `vision_width` channels; ConfigError for odd sizes."""
    config = Blip2QFormerConfig(encoder_hidden_size=vision_width, **cfg.qformer_config)
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"model.qformer_config: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    return QFormer(config, cfg.num_query_token)


def load_blip2(qformer: QFormer, ln_vision: nn.LayerNorm, state: Mapping[str, Tensor], source: Path) -> None:
    """Fill Q-Former and `ln_vision` from a LAVIS state dict.

    Other modules of the file (language model, heads, text branch) are passed over; inside the query branch
    the keys must be equal, else WeightsError.
    """
    target: dict[str, Tensor] = dict(qformer.lavis_parameters())
    target |= {f"ln_vision.{name}": parameter for name, parameter in ln_vision.named_parameters()}
    hint = (
        "Is model.q_former_model the BLIP-2 file, and do num_query_token, qformer_config and the width of the "
        "vision encoder fit it?"
    )
    copy_strict(target, own_blip2_keys(state), source=source, hint=hint)


def own_blip2_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the query branch and `ln_vision` take from a LAVIS state dict."""
    return {name: tensor for name, tensor in state.items() if name.startswith(_OURS) and not _TEXT_BRANCH.match(name)}
