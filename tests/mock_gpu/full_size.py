"""Training steps of a recipe at its full size on the mock: memory by torch's allocator, launches, host time, waits.

    python full_size.py RECIPE [--batch N] [--llm 7b|13b] [--steps N] [--options KEY=VALUE ...]

Weights are storage without content. Prints one JSON object; the batches have the longest text that the recipe allows,
as those of `train.py --check`.
"""

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.models import mini_gpt4
from minigpt4.models.attention import attention_for, enable_activation_checkpointing
from minigpt4.models.base_model import DTYPES, freeze
from minigpt4.models.loading import meta_vision, store_frozen
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.tasks import setup_task

TOKENIZER = Path(__file__).parents[1] / "data/parity/vicuna_tiny"
LLMS = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}
COUNTERS = ("launches", "syncs", "h2d", "d2h", "d2d", "memsets", "gemms", "mallocs", "frees", "events")
DEVICE = torch.device("cuda", 0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--llm", choices=LLMS, default="7b")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--options", nargs="*", default=[])
    return parser.parse_args()


def counts() -> dict[str, int]:
    library = ctypes.CDLL(None)
    library.mock_count.restype = ctypes.c_long
    return {name: library.mock_count(index) for index, name in enumerate(COUNTERS)}


def vision(cfg):
    """The vision side on the device, without content."""
    tower, ln_vision, connector = meta_vision(cfg)
    store_frozen(tower, cfg.freeze_vit, cfg)
    store_frozen(connector, cfg.freeze_qformer, cfg)
    return tuple(part.to_empty(device=DEVICE) for part in (tower, ln_vision, connector))


def language(llm: str):
    """A function that builds the LLM on the device, without content."""

    def build(cfg, directory, device, shard=False):
        config = LlamaConfig(vocab_size=32000, **LLMS[llm])
        attention = cfg.llm_attention or attention_for(device)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[cfg.llm_storage], attn_implementation=attention
            )
        freeze(model.to_empty(device=device))
        if cfg.llm_grad_checkpoint:
            enable_activation_checkpointing(model)
        return model, load_tokenizer(TOKENIZER)

    return build


def main() -> None:
    args = parse_args()
    torch.backends.cudnn.enabled = False
    folder = tempfile.mkdtemp()
    options = [f"model.llama_model={TOKENIZER}", "model.ckpt=null", "run.device=cuda", f"run.output_dir={folder}"]
    cfg = Config(SimpleNamespace(cfg_path=args.recipe, options=[*options, *args.options])).validate()
    mini_gpt4.load_vision, mini_gpt4.load_language_side = vision, language(args.llm)
    task = setup_task(cfg)
    model = task.build_model(cfg, DEVICE)

    class Fed(RunnerBase):
        def build_train_loader(self, datasets):
            return None

    (Path(folder) / "job").mkdir()
    runner = Fed(cfg, "job", task, model, {}, Processes(0, 0, 1, DEVICE))
    batch, size = args.batch or cfg.batch_size(), model.visual_encoder.image_size
    samples = {
        "image": torch.empty(batch, 3, size, size, device=DEVICE),
        "answer": ["word " * 2 * cfg.model.max_txt_len] * batch,
        "image_id": ["0"] * batch,
    }
    steps = []
    try:
        for number in range(args.steps):
            if number == 2:
                torch.cuda.set_sync_debug_mode("error")
            before, start, busy = counts(), time.perf_counter(), time.process_time()
            runner.train_step(0, number, samples)
            steps.append({name: value - before[name] for name, value in counts().items()})
            steps[-1] |= {"wall_ms": 1e3 * (time.perf_counter() - start), "cpu_ms": 1e3 * (time.process_time() - busy)}
        out_of_memory = False
    except torch.OutOfMemoryError:
        out_of_memory = True
    result = {
        "batch": batch,
        "out_of_memory": out_of_memory,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "steps": steps,
    }
    sys.stdout.write(json.dumps(result) + "\n")


main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
