"""From vision tokens to image features to embeddings of the LLM: connectors, and the projection behind them.

A connector says how many image tokens the LLM reads, and of which width the projection reads them. The Q-Former is
transformers' `Blip2QFormerModel` under LAVIS's parameter names; only its query branch is built, and the text branch of
`blip2_pretrained_flant5xxl.pth` is left in the file.
Shapes: B images, N vision tokens of width V, P of them patches, Q image tokens of width H, D channels of the LLM.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from minigpt4.common.checkpoint import copy_strict, find_weights, read_state_dict
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import QFORMER_FILE, MiniGPT4Config, mlp_depth
from minigpt4.models.attention import eager_attention
from minigpt4.models.vision_tower import VisionTower

_RENAMES = (
    ("embeddings.LayerNorm.", "layernorm."),
    (".attention.self.", ".attention.attention."),
    (".crossattention.self.", ".crossattention.attention."),
)
"""LAVIS's and transformers' name of the same module."""
_TEXT_BRANCH = re.compile(
    r"Qformer\.(cls\.|bert\.embeddings\.(word_embeddings|position_embeddings|position_ids)"
    r"|bert\.encoder\.layer\.\d+\.(intermediate|output)\.|bert\.pooler\.)"
)
"""What LAVIS keeps beside the query branch."""
_OURS = ("Qformer.", "query_tokens", "ln_vision.")
JOINED = 4
"""Neighbouring patches that become one image token without Q-Former."""


def lavis_name(name: str) -> str:
    """`encoder.layer.0.attention.attention.query.weight` -> `Qformer.bert.encoder.layer.0.attention.self...`."""
    for lavis, here in _RENAMES:
        name = name.replace(here, lavis)
    return f"Qformer.bert.{name}"


def from_lavis_name(name: str) -> str:
    """The opposite of `lavis_name`."""
    name = name.removeprefix("Qformer.bert.")
    for lavis, here in _RENAMES:
        name = name.replace(lavis, here)
    return name


class Connector(nn.Module):
    """Vision tokens (B, N, V) -> image features (B, Q, H), which a frozen one lets us keep."""

    feature_width: int
    """H."""
    has_norm = True
    """Whether the LayerNorm `ln_vision` stands before it."""
    blocks: Iterable[nn.Module] = ()

    def forward(self, tokens_BNV: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        """(B, Q, H). `attentions` is given a tensor (B, heads, Q, N) by each layer that reads vision tokens: the share
        of each token in each image token."""
        raise NotImplementedError

    def lavis_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ()

    def load_weights(self, cfg: MiniGPT4Config, ln_vision: nn.Module) -> None:
        """Fill it, and the norm before it, from the files that the section names; nothing to do without parameters."""


class QFormer(Connector):
    """Learned queries that read the image: (B, N, V) -> (B, Q, H)."""

    def __init__(self, config: Blip2QFormerConfig, num_query_token: int) -> None:
        super().__init__()
        self.bert = Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.feature_width = config.hidden_size

    @property
    def blocks(self) -> Iterable[nn.Module]:
        return self.bert.encoder.layer

    def forward(self, tokens_BNV: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        queries_BQH = self.query_tokens.expand(tokens_BNV.shape[0], -1, -1)
        if attentions is None:
            return self.bert(query_embeds=queries_BQH, encoder_hidden_states=tokens_BNV).last_hidden_state
        with eager_attention(self.bert):
            output = self.bert(query_embeds=queries_BQH, encoder_hidden_states=tokens_BNV, output_attentions=True)
        attentions += output.cross_attentions
        return output.last_hidden_state

    def lavis_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names of the BLIP-2 file, `query_tokens` first."""
        yield "query_tokens", self.query_tokens
        yield from ((lavis_name(name), parameter) for name, parameter in self.bert.named_parameters())

    def load_weights(self, cfg: MiniGPT4Config, ln_vision: nn.Module) -> None:
        """Fill Q-Former and `ln_vision` from the BLIP-2 file, whose query branch must have their keys."""
        target, path = dict(self.lavis_parameters()), qformer_file(cfg)
        target |= {f"ln_vision.{name}": parameter for name, parameter in ln_vision.named_parameters()}
        hint = "Is model.q_former_model BLIP-2's, and do num_query_token, qformer_config and the ViT's width fit it?"
        copy_strict(target, own_blip2_keys(read_state_dict(path, mapped=True)), source=path, hint=hint)


class Patches(Connector):
    """Patches as image tokens, (B, N, V) -> (B, P, V) or (B, P // 4, 4 V); without weights.

    `identity`: each is one, as in LLaVA. `join4`, as the LLaMA-2 model was released: four in the order of the tokens,
    what is left over at the end is dropped; where the grid's width is no multiple of 4 they reach over the ends of
    rows. `join2x2`: the grid's squares.
    """

    def __init__(self, kind: str, vision_width: int, num_prefix_tokens: int) -> None:
        super().__init__()
        self.kind, self.num_prefix_tokens = kind, num_prefix_tokens
        self.has_norm = kind != "identity"
        self.feature_width = (JOINED if self.has_norm else 1) * vision_width

    def forward(self, tokens_BNV: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        if attentions is not None:
            count, device = tokens_BNV.shape[1], tokens_BNV.device
            sources_1QJ = self(torch.arange(count, device=device, dtype=torch.float32)[None, :, None]).long()
            attentions.append(nn.functional.one_hot(sources_1QJ, count).float().mean(dim=2)[:, None])
        patches_BPV = tokens_BNV[:, self.num_prefix_tokens :]
        if self.kind == "identity":
            return patches_BPV
        if self.kind == "join4":
            usable = patches_BPV.shape[1] // JOINED * JOINED
            return patches_BPV[:, :usable].unflatten(1, (-1, JOINED)).flatten(2)
        side = round(patches_BPV.shape[1] ** 0.5)
        if side * side != patches_BPV.shape[1] or side % 2:
            text = f"this tower's {patches_BPV.shape[1]} patches make no square grid of an even side; take join4"
            raise ConfigError(f"model.connector: join2x2 joins squares of patches, but {text}")
        grid = patches_BPV.unflatten(1, (side // 2, 2, side // 2, 2))
        return grid.transpose(2, 3).flatten(3, 5).flatten(1, 2)


def build_connector(cfg: MiniGPT4Config, tower: VisionTower) -> Connector:
    """The connector that `model.connector` names, with fresh weights."""
    if cfg.connector == "qformer":
        return build_qformer(cfg, tower.num_features)
    return Patches(cfg.connector, tower.num_features, 0 if cfg.vit_prefix == "keep" else tower.num_prefix_tokens)


def build_projection(cfg: MiniGPT4Config, feature_width: int, llm_width: int) -> nn.Module:
    """`model.projection`: (B, Q, H) -> (B, Q, D).

    `linear`, as published; `linear3`, three in a row without activation between them (the paper's Table 5, variant b);
    `mlpNx_gelu`, N with GELU between them, LLaVA 1.5's; `identity`, where the widths are equal.
    """
    if cfg.projection == "identity":
        if feature_width != llm_width:
            widths = f"the image features have {feature_width} channels, model.llama_model {llm_width}"
            raise ConfigError(f"model.projection: identity does not fit: {widths}; take linear")
        return nn.Identity()
    first = nn.Linear(feature_width, llm_width)
    if cfg.projection == "linear":
        return first
    if depth := mlp_depth(cfg.projection):
        later = [layer for _ in range(depth - 1) for layer in (nn.GELU(), nn.Linear(llm_width, llm_width))]
    else:
        later = [nn.Linear(llm_width, llm_width) for _ in range(2)]
    return nn.Sequential(first, *later)


def build_qformer(cfg: MiniGPT4Config, vision_width: int) -> QFormer:
    """A Q-Former with fresh weights for vision tokens of `vision_width` channels; ConfigError for odd sizes."""
    config = Blip2QFormerConfig(encoder_hidden_size=vision_width, **cfg.qformer_config)
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise ConfigError(f"model.qformer_config: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return QFormer(config, cfg.num_query_token)


def own_blip2_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the query branch and `ln_vision` take from a LAVIS state dict."""
    return {name: tensor for name, tensor in state.items() if name.startswith(_OURS) and not _TEXT_BRANCH.match(name)}


def qformer_file(cfg: MiniGPT4Config) -> Path:
    """The BLIP-2 file of `model.q_former_model`."""
    return find_weights(cfg.q_former_model, "model.q_former_model", QFORMER_FILE)
