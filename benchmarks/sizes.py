"""Models of named sizes with seeded random weights, written in the published formats and loaded as a user's are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.merge import write_sharded
from minigpt4.models.connectors import build_qformer
from minigpt4.models.eva_vit import EVA_CLIP_G_SIZES
from minigpt4.models.memory import StorageCounter
from minigpt4.models.transformers_layout import Planned
from minigpt4.models.vision_tower import build_vision_encoder

TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "parity" / "vicuna_tiny"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
STD = 0.02
PUBLISHED_EXTRA_BLOCK = 1
"""eva_vit_g.pth holds one block more than is used."""


@dataclass(frozen=True)
class Size:
    """Widths and depths."""

    llm: dict[str, int]
    """As in a LLaMA's config.json."""
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of the section `model:`."""

    def llm_config(self) -> LlamaConfig:
        """The LLM's config.json."""
        return LlamaConfig(architectures=["LlamaForCausalLM"], **self.llm)

    def section(self, folder: Path, precision: str, **changes: Any) -> dict[str, Any]:
        """The section `model:` whose weights `write_weights` put into `folder`."""
        return {
            "vit_weights": str(folder / "eva_vit_g.pth"),
            "q_former_model": str(folder / "blip2.pth"),
            "llama_model": str(folder / "llm"),
            "vit_precision": precision,
            "llm_precision": precision,
            "max_txt_len": 160,
            "end_sym": "###",
            "llm_sanity_check": False,  # random weights guess, as the check would rightly say
            **self.model,
            **changes,
        }


def _qformer(width: int, layers: int, heads: int, inner: int) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (width, layers, heads, inner), strict=True))


def _llama(width: int, layers: int, heads: int, inner: int, vocabulary: int) -> dict[str, int]:
    return {"vocab_size": vocabulary, **_qformer(width, layers, heads, inner)}


SIZES = {
    "tiny": Size(
        _llama(96, 3, 4, 192, 513),
        {
            "image_size": 56,
            "vit_config": {"embed_dim": 64, "depth": 3, "num_heads": 4},
            "num_query_token": 8,
            "qformer_config": _qformer(48, 4, 4, 96),
        },
    ),
    "mid": Size(
        _llama(512, 8, 8, 1376, 32000),
        {
            "vit_config": {"embed_dim": 384, "depth": 8, "num_heads": 6},
            "qformer_config": _qformer(384, 6, 6, 1536),
        },
    ),
    "1gb": Size(_llama(1536, 14, 12, 4096, 32000)),  # 495 million parameters, 0.99 GB in 16 bits
    "7b": Size(_llama(4096, 32, 32, 11008, 32001)),
}


def write_weights(folder: Path, size: Size, dtype: torch.dtype) -> None:
    """The files of `Size.section`; those that are there stay."""
    if (folder / "llm" / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    _write_vision(folder, MiniGPT4Config(**size.model))
    write_llm(folder / "llm", size.llm_config(), dtype)


def _write_vision(folder: Path, cfg: MiniGPT4Config) -> None:
    """eva_vit_g.pth with a block too many and a head, as published, and the BLIP-2 file."""
    depth = cfg.vit_config.get("depth", EVA_CLIP_G_SIZES["depth"]) + PUBLISHED_EXTRA_BLOCK
    deep = MiniGPT4Config(image_size=cfg.image_size, vit_config={**cfg.vit_config, "depth": depth})
    with torch.device("meta"):
        encoder = build_vision_encoder(deep).model
        qformer = build_qformer(cfg, encoder.num_features)
    state = {n: random_like(p, n, torch.float16) for n, p in encoder.named_parameters()}
    state |= {"head.weight": torch.zeros(1000, encoder.num_features), "head.bias": torch.zeros(1000)}
    torch.save(state, folder / "eva_vit_g.pth")
    blip2 = {n: random_like(p, n, torch.float32) for n, p in qformer.lavis_parameters()}
    blip2 |= {"ln_vision.weight": torch.ones(encoder.num_features), "ln_vision.bias": torch.zeros(encoder.num_features)}
    torch.save({"model": blip2}, folder / "blip2.pth")


def write_llm(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> None:
    """Tokenizer, safetensors, and last config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = model.named_parameters()
    write_sharded({n: Planned(p.shape, dtype, partial(random_like, p, n, dtype)) for n, p in parameters}, folder)
    config.save_pretrained(folder)


def random_like(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Ones for norm weights, zeros for biases, else normal values."""
    if tensor.ndim == 1:
        return torch.full(tensor.shape, float(name.endswith("weight")), dtype=dtype)
    return torch.randn(tensor.shape, dtype=dtype).mul_(STD)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def peak_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """What `run` needs beside the weights of the model, at its peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with StorageCounter(nn.ModuleList([model])) as counter:
        run()
    return counter.peak
