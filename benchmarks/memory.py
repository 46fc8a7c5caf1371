"""GPU memory of a training step: what each switch gives, the largest batch that fits, and 13B on small cards.

    python benchmarks/memory.py --write docs/performance.md                # estimates; no GPU, no weights
    python benchmarks/memory.py --measure --dir /tmp/7b --write docs/performance.md      # on a GPU; 17 GB of files
    python benchmarks/memory.py --measure --size tiny --batch-size 4                     # real steps on a CPU
The estimates are those of `train.py --check`. `--measure` runs a real step of every row that one device can run, with
random weights, and writes its peak beside the estimate.
"""

import argparse
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from command import measured, parser_of
from sizes import SIZES, Size, peak_bytes, weight_bytes, write_weights
from tables import REPOSITORY, machine, table
from torch import nn

from minigpt4.check import expected_lengths, largest_batch
from minigpt4.common.config import Config
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.attention import FUSED
from minigpt4.models.memory import CUDA_ALLOWANCE, GIB, Estimate, Lengths, MetaModel, llm_config_for
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.prompting import ImageFeatures

STAGE_2 = Lengths(prompt=35, answer=160)
"""The longest prompt of prompts/alignment.txt, and `max_txt_len`."""
RECIPES = ("minigpt4_stage1_pretrain", "minigpt4_stage2_finetune", "minigpt4_flickr_finetune")
RECIPES_13B = ("minigpt4_13b_stage2_finetune", "minigpt4_13b_flickr_finetune")
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Way:
    """How a step is computed and where its parts are."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the section `model:`."""
    cached: bool = False
    gpus: int = 1

    def __add__(self, other: "Way") -> "Way":
        changes, cached = {**self.changes, **other.changes}, self.cached or other.cached
        return Way(f"{self.name} + {other.name}", changes, cached, max(self.gpus, other.gpus))


PLAIN = {"vit_precision": "fp32", "llm_logits": "all", "llm_attention": "eager"}
TO_DEFAULTS = (
    Way("plain: vision in fp32, logits everywhere, eager attention", PLAIN),
    Way("and vision in 16 bits, as published", PLAIN | {"vit_precision": "fp16"}),
    Way("and logits at targets (`llm_logits`)", {"llm_attention": "eager"}),
    Way("and fused attention (`llm_attention`): the defaults"),
)
DEFAULTS = Way("defaults")
CACHED = Way("`run.feature_cache` (complete)", cached=True)
RECOMPUTED = Way("`llm_grad_checkpoint`", {"llm_grad_checkpoint": True})
INT8, NF4 = (Way(f"`llm_precision: {storage}`", {"llm_precision": storage}) for storage in ("int8", "nf4"))
SPREAD = tuple(Way(f"`run.parallel: fsdp`, {gpus} GPUs", gpus=gpus) for gpus in (2, 4, 8))
FURTHER = (CACHED, RECOMPUTED, INT8, NF4, *SPREAD, CACHED + RECOMPUTED, RECOMPUTED + NF4, RECOMPUTED + SPREAD[0])
BATCHES = (DEFAULTS, CACHED, RECOMPUTED, NF4, SPREAD[0], SPREAD[1], SPREAD[2], RECOMPUTED + NF4)
BATCHES_13B = (DEFAULTS, NF4, *SPREAD, RECOMPUTED + NF4, *(RECOMPUTED + way for way in SPREAD))


class Sized:
    """A model whose steps are sized in several ways; what ways have in common is sized once."""

    def __init__(self, section: Callable[..., MiniGPT4Config], llm_config: Any, lengths: Lengths) -> None:
        self._meta = functools.cache(lambda changes: MetaModel(section(**dict(changes)), llm_config))
        self._step = functools.cache(lambda changes, size, **how: self._meta(changes).estimate(size, lengths, **how))

    def estimate(self, way: Way, batch_size: int) -> Estimate:
        """Of one GPU."""
        changes = dict(way.changes)
        storage, recompute = changes.pop("llm_precision", None), changes.pop("llm_grad_checkpoint", False)
        key = tuple(sorted(changes.items()))
        estimate = self._step(key, batch_size, recompute=recompute, cached=way.cached)
        if storage:
            return self._meta(key).stored_as(estimate, storage)
        return self._meta(key).sharded_over(estimate, way.gpus)


# Real steps


def real_step(way: Way, size: Size, folder: Path, precision: str, batch_size: int) -> int | None:
    """Peak bytes of a real step, weights included; None for a way that this machine cannot go."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantised = way.changes.get("llm_precision") in ("int8", "nf4")
    if way.gpus > 1 or (quantised and (device == "cpu" or importlib.util.find_spec("bitsandbytes") is None)):
        return None
    changes = {**way.changes, "vit_precision": way.changes.get("vit_precision", precision).replace("fp16", precision)}
    try:
        model = MiniGPT4.from_config(size.section(folder, precision, **changes), device=device).train()
        if model.cfg.llm_attention is None:
            model.llama_model.set_attn_implementation(FUSED)  # what is estimated, also on a CPU
        batch = _batch(model, batch_size, way.cached)
        if way.cached:
            model.visual_encoder = model.Qformer = model.ln_vision = nn.Identity()
        return weight_bytes(model) + peak_bytes(model, lambda: _step(model, batch))
    except torch.OutOfMemoryError:
        return None


def _step(model: MiniGPT4, batch: dict[str, Any]) -> None:
    with torch.autocast(model.device.type, model.llama_model.dtype):
        loss = model(batch)["loss"]
    loss.backward()


def _batch(model: MiniGPT4, batch_size: int, cached: bool) -> dict[str, Any]:
    """Samples of the longest prompt and answer."""
    side = model.visual_encoder.image_size
    image = torch.randn(batch_size, 3, side, side, device=model.device)
    words = ""
    while len(model.llama_tokenizer(words)["input_ids"]) < STAGE_2.prompt:
        words += " a"
    return {
        "image": ImageFeatures(model.image_features(image)) if cached else image,
        "instruction_input": [f"<ImageHere>{words}"] * batch_size,
        "answer": [" a" * STAGE_2.answer] * batch_size,
    }


# Tables


def switches_section(args: argparse.Namespace, folder: Path) -> str:
    """What each switch gives, at one batch."""
    size = SIZES[args.size]
    sized = Sized(
        lambda **changes: MiniGPT4Config(**size.section(folder, "fp16", **changes)), size.llm_config(), STAGE_2
    )
    defaults = sized.estimate(DEFAULTS, args.batch_size)
    steps = [sized.estimate(way, args.batch_size) for way in TO_DEFAULTS]
    down = [_switch_row(args, folder, *row) for row in zip(TO_DEFAULTS, steps, [None, *steps[:-1]], strict=True)]
    further = [_switch_row(args, folder, way, sized.estimate(way, args.batch_size), defaults) for way in FURTHER]
    head = ("step", "estimated, GiB", "saves, GiB", f"fits in {args.gpu_gib:g} GiB", "measured, GiB")
    return (
        f"### Size {args.size}, batch {args.batch_size}, {defaults.tokens} positions\n\n"
        f"From the original's way to the defaults, each row with those above it:\n\n{table(head, down)}\n"
        f"On top of the defaults, each by itself:\n\n{table(head, further)}"
    )


def _switch_row(
    args: argparse.Namespace, folder: Path, way: Way, estimate: Estimate, before: Estimate | None
) -> tuple[str, ...]:
    peak = real_step(way, SIZES[args.size], folder, args.precision, args.batch_size) if args.measure else None
    return (
        way.name,
        f"{estimate.total / GIB:.2f}",
        "" if before is None else f"{(before.total - estimate.total) / GIB:.2f}",
        "yes" if estimate.total <= args.gpu_gib * GIB else "no",
        NOT_MEASURED if peak is None else f"{(peak + CUDA_ALLOWANCE) / GIB:.2f}",
    )


def batches_section(recipes: Sequence[str], ways: Sequence[Way], gpu_gib: float) -> str:
    """Memory of the recipes at their batch, and the largest batch that fits, in each way."""
    head, columns = ["step"], [[way.name for way in ways]]
    for name in recipes:
        path = str(REPOSITORY / "train_configs" / f"{name}.yaml")
        config = Config(SimpleNamespace(cfg_path=path, options=None)).validate()
        change, batch = functools.partial(dataclasses.replace, config.model), config.batch_size()
        sized = Sized(change, llm_config_for(config.model)[0], expected_lengths(config.model))
        estimates = [sized.estimate(way, batch) for way in ways]
        head += [f"`{name}`, batch {batch}, GiB", "largest batch"]
        columns.append([f"{estimate.total / GIB:.1f}" for estimate in estimates])
        largest = [
            largest_batch(functools.partial(sized.estimate, way), estimate, gpu_gib)
            for way, estimate in zip(ways, estimates, strict=True)
        ]
        columns.append(list(map(str, largest)))
    return (
        "Estimated, for one GPU, at the recipe's batch; and the largest batch of one GPU that is estimated to fit in "
        f"{gpu_gib:g} GiB (0: not even one sample).\n\n{table(head, list(zip(*columns, strict=True)))}"
    )


def section(args: argparse.Namespace, folder: Path) -> str:
    """All tables as Markdown."""
    if args.measure:
        write_weights(folder, SIZES[args.size], torch.bfloat16)
    where = f"Machine of the measured rows: {machine()}." if args.measure else "No row is measured."
    parts = [
        "## What memory goes into\n",
        "Estimates of `train.py --check` for one GPU, with 0.8 GiB for CUDA itself, which measured rows have too. "
        f"{where} Rows over several GPUs, and what did not fit, are not measured.\n",
        f"    python benchmarks/memory.py {args.typed}".rstrip() + "\n",
        switches_section(args, folder),
    ]
    if args.size == "7b":
        parts += [
            "### The largest batch, 7B\n",
            batches_section(RECIPES, BATCHES, args.gpu_gib),
            "### 13B\n",
            batches_section(RECIPES_13B, BATCHES_13B, args.gpu_gib),
        ]
    return "\n".join(parts)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, weights=True)
    parser.add_argument("--size", choices=SIZES, default="7b", help="of the table of switches (7b)")
    parser.add_argument("--batch-size", type=int, default=12, help="of the table of switches (12, as published)")
    parser.add_argument("--gpu-gib", type=float, default=23.6, help="memory of the GPU to fit in (23.6)")
    parser.add_argument("--measure", action="store_true", help="run a real step of every row that one device can run")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="of measured rows (bf16)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return measured(args, f"memory {args.size} {args.batch_size}", section)


if __name__ == "__main__":
    sys.exit(main())
