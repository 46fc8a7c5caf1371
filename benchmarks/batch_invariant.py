"""`run.batch_invariant`: how many answers differ between sizes of a batch and numbers of processes, and what it costs.

    python benchmarks/batch_invariant.py --size tiny                    # random weights, 1,000 drawn images, fp32
    python benchmarks/batch_invariant.py --cfg-path eval_configs/mini_flickr_eval.yaml --ckpt output/mini/flickr30k.pth
    torchrun --standalone --nproc-per-node 2 benchmarks/batch_invariant.py --size tiny --against answers.json
Questions of several lengths about images of the mini world, greedy; of the first images also how likely a fixed answer
is. `--save` keeps the answers of the first batch size, with which `--against` compares those of another run. Times are
seconds of the process's CPU, one thread, so other work on the machine counts little; every way is measured in turn.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from command import measured, parser_of, section
from sizes import SIZES, write_weights
from tables import ratio

from minigpt4.common.binding import bind
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes, start_processes, stop_processes
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.inference.image_list import cut
from minigpt4.inference.pipeline import image_processor
from minigpt4.mini.scenes import draw, sample_scenes
from minigpt4.models.attention import attention_for, make_batch_invariant
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.processors import load_processor

QUESTIONS = (
    "What is this?",
    "Describe this image in one sentence.",
    "How many things are there, and how large are they?",
    "Which colour has what is behind the things in this image, and do they stand in a row or in a column?",
)
LIKELIHOODS = 100
"""Images of which likelihoods are compared, too."""
Said = dict[str, Any]


def ask(args: argparse.Namespace, model: MiniGPT4, pixels: torch.Tensor, numbers: list[int]) -> Said:
    """What is said about images, and how likely a fixed answer to the first ones is, by number."""
    texts = [f"<Img><ImageHere></Img> {QUESTIONS[n % len(QUESTIONS)]}" for n in numbers]
    answers = model.generate(pixels[numbers], texts, args.stop, max_new_tokens=args.tokens)
    said: Said = dict(zip(map(str, numbers), answers, strict=True))
    if first := [n for n in numbers if n < LIKELIHOODS]:
        found = model.log_likelihoods(pixels[first], texts[: len(first)], ["two small birds"] * len(first))
        said |= {f"likelihood {n}": list(own) for n, own in zip(first, found, strict=True)}
    return said


@contextmanager
def by_default(model: MiniGPT4) -> Iterator[None]:
    """Inside, without the switch."""
    llm, own = model.llama_model, model.llama_model.config._attn_implementation
    llm.set_attn_implementation(attention_for(model.device))
    try:
        yield
    finally:
        llm.set_attn_implementation(own)


def differing(one: Said, other: Said) -> str:
    """`3 of 1000 answers, 0 of 100 likelihoods`."""
    kinds = {"answers": False, "likelihoods": True}
    keys = {name: [key for key in one if key.startswith("likelihood") == kind] for name, kind in kinds.items()}
    return ", ".join(f"{sum(one[k] != other[k] for k in own)} of {len(own)} {name}" for name, own in keys.items())


def build(args: argparse.Namespace, folder: Path, device: torch.device) -> tuple[MiniGPT4, Any]:
    """The model and its image processor."""
    if args.cfg_path:
        options = [f"model.llm_precision={args.precision}", *([f"model.ckpt={args.ckpt}"] if args.ckpt else [])]
        config = Config(SimpleNamespace(cfg_path=args.cfg_path, options=options)).validate(training=False)
        cfg, processor = config.model, image_processor(config)
    else:
        size = SIZES[args.size]
        write_weights(folder, size, torch.float32)
        cfg = bind(MiniGPT4Config, size.section(folder, args.precision), section="model", source="the benchmark")
        processor = load_processor("blip2_image_eval", {"image_size": cfg.image_size or 224})
    model = MiniGPT4.from_config(cfg, device=device).eval()
    if not args.cfg_path:
        torch.nn.init.normal_(model.llama_proj.weight, std=0.02, generator=torch.Generator(device).manual_seed(0))
    make_batch_invariant(model.llama_model, cfg)
    return model, processor


@torch.inference_mode()
def measure(args: argparse.Namespace, folder: Path, processes: Processes) -> str:
    """The Markdown section; other processes' is empty."""
    model, processor = build(args, folder / str(processes.rank), processes.device)
    pixels = torch.stack([processor(draw(scene)[0]) for scene in sample_scenes("test", args.images, seed=0)])

    def all_answers(size: int) -> Said | None:
        batches = cut(range(args.images), size)[processes.rank :: processes.world_size]
        gathered = processes.gather([ask(args, model, pixels, batch) for batch in batches])
        return gathered and {key: value for rank in gathered for said in rank for key, value in said.items()}

    said = {size: all_answers(size) for size in args.batch_sizes}
    with by_default(model):
        plain = {size: all_answers(size) for size in args.batch_sizes if args.default}
    seconds = {size: times(args, model, pixels, size) for size in args.batch_sizes}
    if not processes.is_main:
        return ""
    first = args.batch_sizes[0]
    if args.save:
        args.save.write_text(json.dumps(said[first]))
    known = json.loads(args.against.read_text()) if args.against else said[first]
    rows = []
    for size in args.batch_sizes:
        on, off = seconds[size]
        without = differing(plain[first], plain[size]) if plain else "-"
        price = [f"{statistics.median(t) / args.timed:.3f}" for t in (off, on)] if on else ["-", "-"]
        rows.append((f"{size}", differing(known, said[size]), without, *price, f"{ratio(on, off):.2f}" if on else "-"))
    head = ("batch", "others than expected", "without the switch", "default, s an answer", "on, s an answer", "times")
    world = f"{processes.world_size} process{'es' if processes.world_size > 1 else ''}"
    name = Path(args.cfg_path).name if args.cfg_path else args.size
    text = (
        f"{args.images} images, at most {args.tokens} tokens, {world}; expected are the answers of "
        f"{'another run' if args.against else f'batch {first}'}. CPU seconds of {args.timed} answers, median of "
        f"{args.repeats} rounds."
    )
    title = f"### Answers that do not depend on the batch, {name}, {args.precision}"
    return section(args, "batch_invariant", title, text, head, rows)


def times(
    args: argparse.Namespace, model: MiniGPT4, pixels: torch.Tensor, size: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of the timed answers with the switch and without it, in turn."""
    on, off = [], []
    for _ in range(args.repeats):
        for seconds in (on, off):
            start = time.process_time()
            for batch in cut(range(args.timed), size):
                with nullcontext() if seconds is on else by_default(model):
                    ask(args, model, pixels, batch)
            seconds.append(time.process_time() - start)
    return on, off


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, weights=True)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of random weights (tiny)")
    parser.add_argument("--cfg-path", help="YAML file with the model, in place of --size")
    parser.add_argument("--ckpt", help="checkpoint (model.ckpt of the YAML)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the LLM (fp32)")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer, at most (16)")
    parser.add_argument("--stop", nargs="*", default=[], help="strings that end an answer; random weights know no end")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--default", action="store_true", help="also count what differs without the switch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the times (3); 0: none")
    parser.add_argument("--timed", type=int, default=32, help="answers of a round (32)")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="keep the answers of the first batch size")
    parser.add_argument("--against", type=Path, metavar="FILE.json", help="compare with those of another run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    processes = start_processes("cuda" if torch.cuda.is_available() else "cpu")
    name = Path(args.cfg_path).stem if args.cfg_path else args.size
    mark = f"batch invariant {name} {args.precision} {processes.world_size}"
    if not processes.is_main:
        args.write = None
    try:
        return measured(args, mark, lambda args, folder: measure(args, folder, processes))
    finally:
        stop_processes()


if __name__ == "__main__":
    sys.exit(main())
