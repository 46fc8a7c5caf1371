"""Captions of several images, the plain way and with each saving: tokens a second, ratio, positions, peak memory.

    python benchmarks/generate.py                                    # size mid, 16 images, greedy
    python benchmarks/generate.py --size mid --beams 5 --write docs/performance.md
    python benchmarks/generate.py --size 7b --precision bf16 --images 12 --dir /tmp/7b      # on a GPU; 17 GB of files
Random weights (seed 0) in the published formats, random images, one prompt. "Plain" is what the original computes:
transformers' own `generate`, an image at a time, the prompt once a beam, logits at all positions of it. Every row has
the same weights and attention, is measured in turn in the same process, and its answers are compared with the plain
ones. Random weights end no answer: with one beam each answer has a length of its own, with several all have one.
"""

import argparse
import dataclasses
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from command import measured, parser_of, section
from sizes import SIZES, peak_bytes, write_weights
from step import PROMPT
from tables import ratio, seconds_in_turn
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from minigpt4.common.errors import RunError
from minigpt4.models.attention import llm_parts, require_compiler
from minigpt4.models.batch_decoder import BatchDecoder, GenerationState
from minigpt4.models.generation import Decoding, generate_ids
from minigpt4.models.mini_gpt4 import MiniGPT4


@dataclass(frozen=True)
class Way:
    """How captions are generated."""

    name: str
    own_loop: bool = False
    """Ours: the prompt once an image, logits at the last position, rows that ended leave."""

    together: bool = False
    """All images in one batch, else one after the other."""

    last_logits: bool = False
    """Of the prompt only the last position's; our loop cannot do otherwise."""

    compiled: bool = False
    """Norms and MLPs of the LLM under torch.compile."""


WAYS = (
    Way("plain"),
    Way("logits at the last position", last_logits=True),
    Way("images together", together=True),
    Way("images together, logits at the last position", together=True, last_logits=True),
    Way("our loop, an image at a time", own_loop=True, last_logits=True),
    Way("our loop, images together", own_loop=True, together=True, last_logits=True),
)
COMPILED = tuple(dataclasses.replace(way, name=f"{way.name}, compiled", compiled=True) for way in WAYS[-2:])


class Limits(StoppingCriteria):
    """Ends each row of transformers' loop at a length of its own."""

    def __init__(self, limits: Sequence[int], device: torch.device) -> None:
        self.limits_B = torch.tensor(limits, device=device)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs) -> Tensor:
        return input_ids.shape[1] >= self.limits_B


@dataclass(frozen=True)
class Work:
    """What is asked of the model."""

    model: MiniGPT4
    pixels: Tensor
    """(B, 3, S, S)."""

    limits: list[int]
    """Tokens of each answer."""

    beams: int

    def answers(self, way: Way) -> list[list[int]]:
        """Ids that are said about each image."""
        with compiled(self.model.llama_model) if way.compiled else nullcontext():
            if way.together:
                return self._said(way, self.pixels, self.limits)
            return [self._said(way, self.pixels[n : n + 1], [limit])[0] for n, limit in enumerate(self.limits)]

    @torch.inference_mode()
    def _said(self, way: Way, pixels: Tensor, limits: list[int]) -> list[list[int]]:
        images = [[own] for own in self.model.encode_img(pixels)[0].split(1)]
        prompts = self.model.prompt_embeds([PROMPT] * len(images), images)
        said = self._by_our_loop(*prompts, limits) if way.own_loop else self._by_transformers(way, *prompts, limits)
        return [ids[:limit] for ids, limit in zip(said, limits, strict=True)]

    def _by_our_loop(self, embeds_BTD: Tensor, mask_BT: Tensor, limits: list[int]) -> list[list[int]]:
        llm, tokenizer = self.model.llama_model, self.model.llama_tokenizer
        if self.beams > 1:
            ids_BL = generate_ids(llm, tokenizer, embeds_BTD, mask_BT, Decoding(self.beams, limits[0]))
            return ids_BL[:, 1:].tolist()
        decoder = BatchDecoder(llm, tokenizer)
        decoder.end_ids = []
        rows = [GenerationState(Decoding(max_new_tokens=limit)) for limit in limits]
        decoder.add(rows, embeds_BTD, mask_BT)
        while decoder.rows:
            decoder.step()
        return [row.ids[1:] for row in rows]

    def _by_transformers(self, way: Way, embeds_BTD: Tensor, mask_BT: Tensor, limits: list[int]) -> list[list[int]]:
        llm = self.model.llama_model
        with nullcontext() if way.last_logits else all_logits(llm):
            return llm.generate(
                inputs_embeds=embeds_BTD,
                attention_mask=mask_BT,
                num_beams=self.beams,
                max_new_tokens=max(limits),
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([Limits(limits, mask_BT.device)] if self.beams == 1 else []),
            ).tolist()


@contextmanager
def compiled(llm: nn.Module) -> Iterator[None]:
    """Inside, norms and MLPs are compiled; torch keeps what it has compiled for the next time."""
    parts = list(llm_parts(llm))
    for part in parts:
        part.compile(dynamic=True)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


@contextmanager
def all_logits(llm: nn.Module) -> Iterator[None]:
    """Inside, the LLM gives logits at all positions that it reads, whatever it is asked for."""

    def forget(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {name: value for name, value in kwargs.items() if name != "logits_to_keep"}

    hook = llm.register_forward_pre_hook(forget, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def positions(work: Work, way: Way) -> int:
    """Rows times positions that the LLM reads."""
    calls: list[int] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        read = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        calls.append(read.shape[0] * read.shape[1])

    hook = work.model.llama_model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        work.answers(way)
    finally:
        hook.remove()
    return sum(calls)


def build(args: argparse.Namespace, folder: Path) -> Work:
    """The model and what it is asked."""
    size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    write_weights(folder, size, torch.float32 if args.size != "7b" else torch.bfloat16)
    model = MiniGPT4.from_config(size.section(folder, args.precision), device=device).eval()
    nn.init.normal_(model.llama_proj.weight, std=0.02, generator=torch.Generator(device).manual_seed(0))
    model.llama_model.generation_config.eos_token_id = None  # random weights know no end
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    side = size.model.get("image_size", 224)
    pixels = torch.randn(args.images, 3, side, side, generator=generator).to(device)
    low, high = args.tokens
    limits = [chance.randint(low, high) for _ in range(args.images)] if args.beams == 1 else [high] * args.images
    return Work(model, pixels, limits, args.beams)


def measure(args: argparse.Namespace, folder: Path) -> str:
    """The Markdown section; RunError if in fp32 an answer is not the plain one."""
    work = build(args, folder)
    if args.compile:
        require_compiler(work.model.device)
    every = [*WAYS, *(COMPILED if args.compile else ())]
    ways = {way.name: way for way in every if not args.only or way.name in args.only}
    said = {name: work.answers(way) for name, way in ways.items()}
    seconds = seconds_in_turn({name: lambda way=way: work.answers(way) for name, way in ways.items()}, args.repeats)
    plain, rows = next(iter(ways)), []
    for name, way in ways.items():
        same = sum(one == other for one, other in zip(said[name], said[plain], strict=True))
        if same < args.images and args.precision == "fp32":
            raise RunError(f"{name}: {args.images - same} of {args.images} answers are not those of '{plain}'")
        rows.append(
            (
                name,
                f"{sum(work.limits) / statistics.median(seconds[name]):.1f}",
                f"{ratio(seconds[plain], seconds[name]):.2f}",
                str(positions(work, way)),
                f"{peak_bytes(work.model, lambda way=way: work.answers(way)) / 2**20:.0f}",
                f"{same} of {args.images}",
            )
        )
    head = ("generation", "tokens/s", "times faster", "positions read", "peak beside weights, MiB", "answers as plain")
    low, high = args.tokens
    text = (
        f"{args.precision}, attention `{work.model.llama_model.config._attn_implementation}`, answers of "
        f"{f'{low} to {high}' if args.beams == 1 else high} tokens; from pixels to ids; median of {args.repeats} "
        "rounds. `plain` is `generate` of transformers, an image at a time, the prompt once a beam, logits at all its "
        "positions; rows without `our loop` change only what they name. A position is one that the LLM reads, once for "
        "each row of its batch."
    )
    title = f"### Generation, size {args.size}, {args.images} images, beams {args.beams}"
    return section(args, "generate", title, text, head, rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, weights=True)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--images", type=int, default=16, help="images, all in one batch where they go together (16)")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(20, 90), metavar=("LOW", "HIGH"), help="of an answer (20 90)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="also measure our loop under torch.compile")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--only", nargs="*", help="names of rows; the first is what the others are compared with")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return measured(args, f"generate {args.size} {args.images} {args.beams} {args.precision}", measure)


if __name__ == "__main__":
    sys.exit(main())
