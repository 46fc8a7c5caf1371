"""Training steps of a recipe, or tokens of answers, at full size on a GPU, without weight files.

    python benchmarks/gpu_step.py train_configs/minigpt4_flickr_finetune.yaml
    python benchmarks/gpu_step.py RECIPE [--llm 7b|13b] [--batch N] [--steps N] [--tokens N] [--options KEY=VALUE ...]
    torchrun --nproc-per-node 4 benchmarks/gpu_step.py RECIPE --options run.parallel=fsdp

The runner, its step and its precision are those of `train.py`. Weights are random and made on the device; the batches
have the longest text that the recipe allows, as those of `train.py --check`, or with `--vary` texts of any length.
Rank 0 prints one JSON object: memory, seconds, and of each step the host's milliseconds, its waits for the GPU and, on
the mock of the tests, its launches.
With `--tokens` the model answers instead, and a step is a token.
"""

import argparse
import ctypes
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes, seed_everything, start_processes
from minigpt4.conversation.decoding import Decoding
from minigpt4.models import fsdp, mini_gpt4
from minigpt4.models.attention import attention_for, enable_activation_checkpointing
from minigpt4.models.base_model import DTYPES, freeze
from minigpt4.models.batch_decoder import BatchDecoder, GenerationState
from minigpt4.models.loading import build_vision, store_frozen
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.models.train_rules import apply_rule
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.tasks import setup_task

TOKENIZER = Path(__file__).parents[1] / "tests/data/parity/vicuna_tiny"
LLMS = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}
STD = 0.02
WARM_UP = 2
"""Steps that are not timed: they make states and grow the allocator's pools."""
PROMPT = 64
"""Positions of the prompt that an answer begins after, image included."""


def fill(module: nn.Module, device: torch.device) -> nn.Module:
    """A module of meta parameters on the device, with random weights; its buffers stay what they are."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in module.named_parameters():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            own.normal_(std=STD) if own.ndim > 1 else own.fill_(float(name.endswith("weight")))
    return module


def vision(cfg: Any, device: torch.device) -> tuple[nn.Module, ...]:
    """The vision side, stored as the recipe says."""
    with init_empty_weights(include_buffers=False):
        tower, ln_vision, connector = build_vision(cfg)
    store_frozen(tower, cfg.freeze_vit, cfg)
    store_frozen(connector, cfg.freeze_qformer, cfg)
    return tuple(fill(part, device) for part in (tower, ln_vision, connector))


def language(size: str, cfg: Any, device: torch.device, shard: bool) -> tuple[nn.Module, Any]:
    """The LLM, whole or sharded, and a tokenizer of LLaMA's kind."""
    config = LlamaConfig(vocab_size=32000, **LLMS[size])
    attention = cfg.llm_attention or attention_for(device)
    with init_empty_weights(include_buffers=False):
        llm = AutoModelForCausalLM.from_config(config, dtype=DTYPES[cfg.llm_storage], attn_implementation=attention)
    freeze(llm)
    if shard:
        fsdp._shard(llm, DeviceMesh.from_group(torch.distributed.group.WORLD, device.type))
    freeze(fill(llm, device))
    if cfg.train.llm.rule in ("full", "last"):
        apply_rule(llm, cfg.train.llm, "model.train.llm", fsdp.decoder_layers(llm))
    if shard:
        fsdp.dummy_forward(llm)
    if cfg.llm_grad_checkpoint:
        enable_activation_checkpointing(llm)
    return llm, load_tokenizer(TOKENIZER)


def training(
    cfg: Config, model: nn.Module, image: Tensor, folder: str, processes: Processes, vary: bool
) -> Callable[[int], Any]:
    """A function that makes training step number n; `vary`: its texts have any length, not the longest."""

    class WithoutData(RunnerBase):
        def build_train_loader(self, datasets: Any) -> None:
            return None

    (Path(folder) / "job").mkdir(exist_ok=True)
    runner = WithoutData(cfg, "job", setup_task(cfg), model, {}, processes)
    longest, chance = cfg.model.max_txt_len, random.Random(0)

    def step(number: int) -> Any:
        words = [chance.randint(5, longest) if vary else 2 * longest for _ in image]
        samples = {"image": image, "answer": ["word " * count for count in words], "image_id": ["0"] * len(image)}
        return runner.train_step(0, number, samples)

    return step


def answering(model: nn.Module, batch_size: int, tokens: int) -> Callable[[int], Any]:
    """A function that decodes token number n of as many answers, which never end."""
    llm, device = model.eval().llama_model, model.device
    llm.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[])
    decoder = BatchDecoder(llm, model.llama_tokenizer, model.token_graphs)
    rows = [GenerationState(Decoding(max_new_tokens=tokens + 2)) for _ in range(batch_size)]
    embeds_BTD = torch.randn(batch_size, PROMPT, llm.config.hidden_size, dtype=llm.dtype, device=device) * STD
    decoder.add(rows, embeds_BTD, torch.ones(batch_size, PROMPT, dtype=torch.long, device=device))
    return lambda number: decoder.step()


def measure(step: Callable[[int], Any], count: int) -> dict[str, Any]:
    """`count` steps one after the other; of each the host's milliseconds, and how often it waited for the GPU."""
    found: dict[str, Any] = {"host_ms": [], "cpu_ms": [], "launches": [], "waits": []}
    began = time.perf_counter()
    for number in range(count):
        if number == WARM_UP:
            torch.cuda.synchronize()
            began = time.perf_counter()
        start, busy, launched = time.perf_counter(), time.process_time(), _launches()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step(number)
            torch.cuda.set_sync_debug_mode("default")
        found["host_ms"].append(1e3 * (time.perf_counter() - start))
        found["cpu_ms"].append(1e3 * (time.process_time() - busy))
        found["launches"].append(_launches() - launched)
        found["waits"].append(sum("called a synchronizing" in str(warning.message) for warning in said))
    torch.cuda.synchronize()
    found["seconds"] = (time.perf_counter() - began) / max(1, count - WARM_UP)
    return found


def _launches() -> int:
    """Kernels launched so far, where the library that stands in for CUDA in the tests counts them; else 0."""
    count = getattr(ctypes.CDLL(None), "mock_count", None)
    return count(0) if count else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--llm", choices=LLMS, default="7b", help="size of the LLM (7b)")
    parser.add_argument("--batch", type=int, help="micro-batch (the recipe's)")
    parser.add_argument("--steps", type=int, default=6, help=f"training steps, of which {WARM_UP} are not timed (6)")
    parser.add_argument("--tokens", type=int, help="decode so many tokens instead")
    parser.add_argument("--vary", action="store_true", help="texts of all lengths, not the longest")
    parser.add_argument("--no-cudnn-attention", action="store_true", help="scaled_dot_product_attention without cuDNN")
    parser.add_argument("--flops", action="store_true", help="count a step's floating-point operations, too")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="override config values")
    return parser.parse_args()


def main() -> int:
    """Exit status 0; a full memory is a result, not an error."""
    args, folder = parse_args(), tempfile.mkdtemp()
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn_attention)
    processes = start_processes("cuda")
    device = processes.device
    given = [f"model.llama_model={TOKENIZER}", "model.ckpt=null", "run.device=cuda", f"run.output_dir={folder}"]
    cfg = Config(SimpleNamespace(cfg_path=args.recipe, options=[*given, *args.options])).validate()
    batch = args.batch or cfg.batch_size()
    seed_everything(cfg.run.seed)  # a step draws its prompts
    mini_gpt4.load_vision = vision
    mini_gpt4.load_language_side = lambda section, _, at, shard=False: language(args.llm, section, at, shard)
    result: dict[str, Any] = {"batch": batch, "out_of_memory": False}
    try:
        model = setup_task(cfg).build_model(cfg, device)
        side = model.visual_encoder.image_size
        image = torch.zeros(batch, 3, side, side, device=device)
        if args.tokens:
            step, count = answering(model, batch, args.tokens), args.tokens
        else:
            step, count = training(cfg, model, image, folder, processes, args.vary), args.steps
        result |= measure(step, count)
        if args.flops:
            with FlopCounterMode(display=False) as counter:
                step(count)
            result["flops"] = counter.get_total_flops()
    except torch.OutOfMemoryError:
        result["out_of_memory"] = True
    result["allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    result["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    if processes.is_main:
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the process group's threads need no farewell
