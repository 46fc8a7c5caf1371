"""How the shipped mini vision encoder and Q-Former were made: both learn to say what scenes show.

As BLIP-2's Q-Former was trained with a frozen LLM behind it, these queries learn words in the LLM's terms: an output
is pulled to the code of its word and place (`files.word_codes`), by distance and by being nearer to it than to
other codes. The ViT's patches predict what they lie on, which makes it learn many times faster; that head is dropped.
Shapes: B scenes, N patches, Q queries, W words, D channels.
"""

import io
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.mini import files
from minigpt4.mini.scenes import draw, sample_scene
from minigpt4.models.connectors import build_qformer
from minigpt4.models.vision_tower import build_vision_encoder
from minigpt4.processors.blip_processors import CLIP_MEAN, CLIP_STD

log = logging.getLogger(__name__)

PRETRAINING_SEED = 1
"""Seed of the scenes here; the quickstart's data sets use another one."""


@dataclass(frozen=True)
class Settings:
    """What a pretraining run depends on; `steps` of `batch_size` scenes, drawn from `scenes` different ones."""

    scenes: int = 60_000
    steps: int = 4_000
    batch_size: int = 48
    lr: float = 1e-3
    warmup_steps: int = 500
    weight_decay: float = 0.05
    test_scenes: int = 1_000
    log_every: int = 100
    save_every: int = 500
    seed: int = PRETRAINING_SEED
    sharpness: float = 0.15
    """Of the choice between words: factor of the product of output and code."""

    distance_weight: float = 3.0


class DrawnScenes(NamedTuple):
    """Pictures (n, S, S, 3) uint8, patch ids (n, N) and word ids (n, Q) uint8."""

    pictures: np.ndarray
    patch_ids: np.ndarray
    word_ids: np.ndarray

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, 3, S, S) float32, patch ids (B, N), word ids (B, Q) int64."""
        image = torch.from_numpy(self.pictures[indices]).to(device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        ids = (torch.from_numpy(ids[indices]).to(device).long() for ids in (self.patch_ids, self.word_ids))
        return (image - mean) / std, *ids


def _draw_one(task: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = sample_scene(*task)
    picture, pasted = draw(scene)
    file = io.BytesIO()  # stage-1 shards hold JPEG files: the encoder should know their noise
    picture.save(file, "JPEG", quality=90)
    small = Image.open(file).resize((files.IMAGE_SIZE, files.IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(small), files.patch_ids(scene, pasted), files.word_ids(scene)


def draw_scenes(split: str, count: int, seed: int, processes: int) -> DrawnScenes:
    """The first `count` scenes of a split as arrays; 37 KB each."""
    side, grid = files.IMAGE_SIZE, files.IMAGE_SIZE // files.PATCH_SIZE
    drawn = [np.empty((count, *shape), np.uint8) for shape in ((side, side, 3), (grid * grid,), (files.QUERIES,))]
    tasks = ((split, index, seed) for index in range(count))
    with get_context("spawn").Pool(processes) as pool:
        for index, parts in enumerate(pool.imap(_draw_one, tasks, chunksize=200)):
            for array, part in zip(drawn, parts, strict=True):
                array[index] = part
    return DrawnScenes(*drawn)


class Pretrainer(nn.Module):
    """Vision encoder, `ln_vision` and Q-Former as MiniGPT4 builds them, and a head over the words for patches."""

    codes_QWD: Tensor

    def __init__(self, codes_QWD: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes_QWD", codes_QWD, persistent=False)
        cfg = MiniGPT4Config(
            image_size=files.IMAGE_SIZE,
            vit_config=dict(files.VIT_SIZES),
            qformer_config=dict(files.QFORMER_SIZES),
            num_query_token=files.QUERIES,
        )
        self.vit = build_vision_encoder(cfg)
        self.ln_vision = nn.LayerNorm(self.vit.num_features)
        self.qformer = build_qformer(cfg, self.vit.num_features)
        self.patch_head = nn.Linear(self.vit.num_features, codes_QWD.shape[1])
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, image_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of patches (B, N, W), and what the queries say (B, Q, D)."""
        tokens_BND = self.ln_vision(self.vit(image_B3SS))
        return self.patch_head(tokens_BND[:, 1:]), self.qformer(tokens_BND)

    def word_scores(self, said_BQD: Tensor) -> Tensor:
        """(B, Q, W) float32; the largest belongs to the nearest code, for all are equally long."""
        return torch.einsum("bqd,qwd->bqw", said_BQD.float(), self.codes_QWD)

    def save(self, vit_file: Path, qformer_file: Path) -> None:
        """LAVIS's two files, 16 bits."""
        vit = {name: p.detach().half().cpu() for name, p in self.vit.model.state_dict().items()}
        blip2 = dict(self.qformer.lavis_parameters())
        blip2 |= {f"ln_vision.{name}": p for name, p in self.ln_vision.named_parameters()}
        torch.save(vit, vit_file)
        torch.save({"model": {name: p.detach().half().cpu() for name, p in blip2.items()}}, qformer_file)


def lr_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def orders(settings: Settings) -> Iterator[np.ndarray]:
    """Indices of each step's scenes: passes over all scenes, each in an order of its own."""
    steps_a_pass = settings.scenes // settings.batch_size
    for step in range(settings.steps):
        number, place = divmod(step, steps_a_pass)
        if place == 0:
            order = np.random.default_rng([settings.seed, number]).permutation(settings.scenes)
        yield order[place * settings.batch_size : (place + 1) * settings.batch_size]


@torch.no_grad()
def accuracy(model: Pretrainer, drawn: DrawnScenes, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Share of right words by kind of query, over the scenes where there is something to say."""
    model.eval()
    right = []
    for start in range(0, len(drawn.pictures), 100):
        image, _, ids = drawn.batch(np.arange(start, min(start + 100, len(drawn.pictures))), device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            right.append((model.word_scores(model(image)[1]).argmax(-1) == ids).cpu())
    model.train()
    hit_nQ, said_nQ = torch.cat(right).numpy(), drawn.word_ids != 0
    slices = (slice(0, 1), slice(1, 2), slice(2, None, 2), slice(3, None, 2))
    parts = dict(zip(("background", "layout", "things", "amounts"), slices, strict=True))
    return {name: round(float(hit_nQ[:, part][said_nQ[:, part]].mean()), 4) for name, part in parts.items()}


def pretrain(
    settings: Settings, codes_QWD: Tensor, folder: Path, device: torch.device, dtype: torch.dtype, processes: int
) -> dict:
    """Train; returns the accuracies on scenes of new combinations.

    `codes_QWD` is from `files.word_codes`. Every save writes the two weights files into `folder`; `log.jsonl` grows in
    between.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log.info("Drawing %d scenes", settings.scenes + settings.test_scenes)
    train = draw_scenes("train", settings.scenes, settings.seed, processes)
    test = draw_scenes("test", settings.test_scenes, settings.seed, processes)
    torch.manual_seed(settings.seed)
    set_fused_attn(device.type != "cpu")  # on CPUs the backward pass of the fused one is slower
    model = Pretrainer(codes_QWD).to(device).train()
    betas, decay = (0.9, 0.98), settings.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=betas, weight_decay=decay, fused=True)
    started, sums = time.monotonic(), torch.zeros(3)
    for step, indices in enumerate(orders(settings), start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step - 1, settings)
        sums += _update(model, optimizer, train.batch(indices, device), settings, dtype)
        if step % settings.log_every:
            continue
        means = (round(mean, 4) for mean in (sums / settings.log_every).tolist())
        record = {"step": step, **dict(zip(("patch_loss", "word_loss", "distance"), means, strict=True))}
        if step % settings.save_every == 0:
            record |= accuracy(model, test, device, dtype)
            model.save(folder / files.VIT_FILE.name, folder / files.QFORMER_FILE.name)
        record["seconds"] = round(time.monotonic() - started, 1)
        log.info("%s", record)
        with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        sums.zero_()
    result = accuracy(model, test, device, dtype)
    model.save(folder / files.VIT_FILE.name, folder / files.QFORMER_FILE.name)
    metadata = asdict(settings) | {"dtype": str(dtype).removeprefix("torch."), "accuracy": result}
    (folder / "settings.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return result


def _update(
    model: Pretrainer,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
    dtype: torch.dtype,
) -> Tensor:
    """One optimizer step; returns (3,): losses of patches and of words, nats, and the squared distance a channel."""
    image, patch_ids, word_ids = batch
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        patches, said_BQD = model(image)
    patch_loss = F.cross_entropy(patches.float().flatten(0, 1), patch_ids.flatten())
    scores = settings.sharpness * model.word_scores(said_BQD)
    word_loss = F.cross_entropy(scores.flatten(0, 1), word_ids.flatten())
    code_BQD = model.codes_QWD[torch.arange(files.QUERIES, device=image.device), word_ids]
    distance = F.mse_loss(said_BQD.float(), code_BQD)
    optimizer.zero_grad()
    (patch_loss + word_loss + settings.distance_weight * distance).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return torch.stack((patch_loss, word_loss, distance)).detach().cpu()
