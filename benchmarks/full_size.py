"""One training step at full size with random weights: ViT-g, Q-Former and a 7B LLaMA, in the published formats.

Writes the weights once (17 GB: eva_vit_g.pth, the BLIP-2 file, sharded safetensors), loads them as a user's run
does, then runs one forward and backward pass and prints a Markdown table.

    python benchmarks/full_size.py --dir /tmp/full_size --batch-size 2
"""

import argparse
import logging
import platform
import resource
from pathlib import Path

import torch
from sizes import SIZES, write_weights
from tables import synchronised_time

from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.memory import GIB, Lengths, MetaModel
from minigpt4.models.mini_gpt4 import MiniGPT4

ANSWER = "A brown dog sleeps on a red blanket. Several wooden boats are tied to the pier. " * 3


def peak_gib() -> float:
    """Peak memory: of the GPU if there is one, else resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(cfg: MiniGPT4Config, batch_size: int, device: str) -> list[tuple[str, str]]:
    """Load, forward, backward; rows of the table."""
    times = [synchronised_time()]
    model = MiniGPT4.from_config(cfg, device=device)
    times.append(synchronised_time())
    samples = {
        "image": torch.randn(batch_size, 3, cfg.image_size, cfg.image_size),
        "answer": [ANSWER] * batch_size,
        "instruction_input": ["<Img><ImageHere></Img> Describe this image. "] * batch_size,
    }
    lengths: list[int] = []
    model.llama_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    loss = model(samples)["loss"]
    times.append(synchronised_time())
    loss.backward()
    times.append(synchronised_time())
    gradient = model.llama_proj.weight.grad
    load, forward, backward = (f"{after - before:.1f}" for before, after in zip(times, times[1:], strict=False))
    estimate = MetaModel(cfg, SIZES["7b"].llm_config()).estimate(
        batch_size, Lengths(lengths[0] - 1 - cfg.num_query_token - cfg.max_txt_len, cfg.max_txt_len)
    )
    return [
        ("trained parameters", f"{sum(p.numel() for p in model.trainable_parameters().values()):,}"),
        ("tokens of a sequence", str(lengths[0])),
        ("load, s", load),
        (f"forward at batch {batch_size}, s", forward),
        ("backward, s", backward),
        ("loss", f"{loss.item():.3f}"),
        ("gradient of llama_proj.weight", f"finite: {bool(gradient.isfinite().all())}, norm {gradient.norm():.3g}"),
        ("peak memory, GiB", f"{peak_gib():.1f}"),
        ("estimated weights + activations, GiB", f"{(estimate.weights + estimate.activations) / GIB:.1f}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where the random weights go (17 GB)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="bf16")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.manual_seed(0)
    size = SIZES["7b"]
    write_weights(args.dir, size, torch.bfloat16)
    cfg = MiniGPT4Config(**size.section(args.dir, args.precision))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rows = run(cfg, args.batch_size, device)
    print(
        f"\n{platform.machine()}, {place}, torch {torch.__version__}, {args.precision}\n\n| what | value |\n|---|---|"
    )
    print("\n".join(f"| {name} | {value} |" for name, value in rows))


if __name__ == "__main__":
    main()
