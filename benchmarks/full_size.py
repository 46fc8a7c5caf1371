"""One training step at full size with random weights: ViT-g, Q-Former and a 7B LLaMA, in the published formats.

Writes the weights once (17 GB: eva_vit_g.pth, the BLIP-2 file, sharded safetensors), loads them as a user's run
does, then runs one forward and backward pass and prints a Markdown table.

    python benchmarks/full_size.py --dir /tmp/full_size --batch-size 2
"""

import argparse
import json
import logging
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from minigpt4.common.schemas.model import MiniGPT4Config
from minigpt4.models.eva_vit import EVA_CLIP_G_SIZES, build_vision_encoder
from minigpt4.models.memory import GIB, Lengths, MetaModel
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.qformer import build_qformer

TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "parity" / "vicuna_tiny"
LLAMA_7B = LlamaConfig(
    vocab_size=32001, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
SHARD_BYTES = 2 * GIB
STD = 0.02
ANSWER = "A brown dog sleeps on a red blanket. Several wooden boats are tied to the pier. " * 3


def random_like(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Ones for norm weights, zeros for biases, else normal values."""
    if tensor.ndim == 1:
        return torch.full(tensor.shape, float(name.endswith("weight")), dtype=dtype)
    return torch.randn(tensor.shape, dtype=dtype).mul_(STD)


def write_vision(folder: Path, cfg: MiniGPT4Config) -> None:
    """eva_vit_g.pth with its 40 blocks and head, and the BLIP-2 file."""
    with torch.device("meta"):
        deep = MiniGPT4Config(vit_config={"depth": EVA_CLIP_G_SIZES["depth"] + 1})
        encoder = build_vision_encoder(deep).model
        qformer = build_qformer(cfg, encoder.num_features)
    state = {n: random_like(p, n, torch.float16) for n, p in encoder.named_parameters()}
    state |= {"head.weight": torch.zeros(1000, encoder.num_features), "head.bias": torch.zeros(1000)}
    torch.save(state, folder / "eva_vit_g.pth")
    blip2 = {n: random_like(p, n, torch.float32) for n, p in qformer.lavis_parameters()}
    blip2 |= {"ln_vision.weight": torch.ones(encoder.num_features), "ln_vision.bias": torch.zeros(encoder.num_features)}
    torch.save({"model": blip2}, folder / "blip2.pth")


def write_llm(folder: Path) -> None:
    """config.json, tokenizer and sharded safetensors of a LLaMA 7B in bf16."""
    folder.mkdir()
    LLAMA_7B.architectures = ["LlamaForCausalLM"]
    LLAMA_7B.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_7B)
    weight_map = {}
    for number, shard in enumerate(shards(model), start=1):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shards(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Random weights, about SHARD_BYTES at a time."""
    shard: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        shard[name] = random_like(parameter, name, torch.bfloat16)
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def peak_gib() -> float:
    """Peak memory: of the GPU if there is one, else resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synchronised_time() -> float:
    """Seconds, with all GPU work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
    estimate = MetaModel(cfg, LLAMA_7B).estimate(
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
    cfg = MiniGPT4Config(
        vit_weights=str(args.dir / "eva_vit_g.pth"),
        q_former_model=str(args.dir / "blip2.pth"),
        llama_model=str(args.dir / "llama-7b"),
        vit_precision=args.precision,
        llm_precision=args.precision,
        max_txt_len=160,
        end_sym="###",
    )
    if not (args.dir / "llama-7b").exists():
        args.dir.mkdir(parents=True, exist_ok=True)
        write_vision(args.dir, cfg)
        write_llm(args.dir / "llama-7b")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rows = run(cfg, args.batch_size, device)
    print(
        f"\n{platform.machine()}, {place}, torch {torch.__version__}, {args.precision}\n\n| what | value |\n|---|---|"
    )
    print("\n".join(f"| {name} | {value} |" for name, value in rows))


if __name__ == "__main__":
    main()
