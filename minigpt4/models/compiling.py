"""`run.compile`: torch.compile on the parts whose time goes into small operations.

Of the LLM's layers that is everything but attention: norms and MLPs are the same in each layer, so one compilation
serves them all, whereas attention knows its layer's number and would be compiled for each. Blocks of the vision side
are compiled whole. Batches differ in length, so shapes are dynamic.
"""

import logging
from collections.abc import Iterator

import torch
from torch import nn

from minigpt4.common.errors import ConfigError

log = logging.getLogger(__name__)


def require_compiler(device: torch.device) -> None:
    """ConfigError if torch.compile has nothing to compile with."""
    from torch._inductor import cpp_builder, exc  # seconds to import, for a switch that is off by default
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise ConfigError("run.compile: needs Triton, which comes with torch's CUDA packages; or set it to False")
        return
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ConfigError(
            "run.compile: needs a C++ compiler such as g++ on this machine, and none was found "
            "(apt-get install g++, or the variable CXX); or set it to False"
        ) from error


def compile_parts(model: nn.Module) -> None:
    """Let the parts of a `MiniGPT4` compile themselves when they first run; ConfigError without compiler."""
    require_compiler(model.device)
    parts = [*llm_parts(model.llama_model), *_vision_blocks(model)]
    for part in parts:
        part.compile(dynamic=True)
    log.info("run.compile: %d parts; the first step takes up to minutes longer", len(parts))


def llm_parts(llm: nn.Module) -> Iterator[nn.Module]:
    """Norms and MLPs of the LLM's layers."""
    for layer in getattr(llm.base_model, "layers", []):
        yield from (part for part in layer.children() if not hasattr(part, "layer_idx"))


def _vision_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """None of a vision side that waits to be needed: it encodes each image once, for the cache."""
    if next(model.visual_encoder.parameters()).device.type == "meta":
        return
    yield from getattr(model.visual_encoder.model, "blocks", [])
    if model.Qformer is not None:
        yield from model.Qformer.bert.encoder.layer
