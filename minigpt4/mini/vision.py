"""Sizes of the mini vision encoder and Q-Former, and the words that their queries learned to say.

Shapes: N patches, Q = 8 queries, W words, D = 192 channels. Query 0 says the background, query 1 the layout; then, for
each of three places in reading order, one query says the kind of thing and the next one says number and size.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minigpt4.mini.drawing import SIDE
from minigpt4.mini.scenes import ALONE, COLUMN, LARGE, ROW, SMALL, Scene
from minigpt4.mini.things import BACKGROUNDS, NUMBERS, THINGS

WEIGHTS = Path(__file__).parent / "weights"
VIT_FILE = WEIGHTS / "eva_vit_mini.pth"
QFORMER_FILE = WEIGHTS / "blip2_mini.pth"

IMAGE_SIZE = 112
PATCH_SIZE = 14
QUERIES = 8
VIT_SIZES = {"embed_dim": 192, "depth": 6, "num_heads": 3, "patch_size": PATCH_SIZE, "mlp_ratio": 4}
QFORMER_SIZES = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "cross_attention_frequency": 1,
}

PLACES = 3
NOTHING = "nothing"
_AMOUNTS = tuple(f"{NUMBERS[count]} {size}" for count in (1, 2, 3) for size in (SMALL, LARGE))
WORDS = (NOTHING, *BACKGROUNDS, ALONE, ROW, COLUMN, *(thing.name for thing in THINGS), *_AMOUNTS)
"""Everything that a query can say."""
_WORD_IDS = {word: index for index, word in enumerate(WORDS)}
_COVERED = 0.15  # a patch belongs to a thing that inks at least this share of it


def words(scene: Scene) -> list[str]:
    """The Q words of a scene."""
    said = [scene.background, scene.layout]
    for group in scene.groups:
        said += [group.thing.name, f"{NUMBERS[group.count]} {group.size}"]
    return said + [NOTHING] * (QUERIES - len(said))


def word_ids(scene: Scene) -> np.ndarray:
    """(Q,) int64, indices into WORDS."""
    return np.array([_WORD_IDS[word] for word in words(scene)])


def word_codes(embedding_WE: Tensor) -> Tensor:
    """What each query's output should be when it says each word: (Q, W, D) float32, rows of mean 0 and norm sqrt(D).

    Half of a code is the word: its `embedding_WE`, the LLM's, seen from the middle of all words and turned into as few
    channels as possible. So words that the LLM takes for similar lie side by side, and one linear layer brings them all
    back. The other half is the query's place, a channel of its own.
    """
    channels = QFORMER_SIZES["hidden_size"]
    centred_WE = embedding_WE - embedding_WE.mean(0)
    turned_WK = centred_WE @ torch.linalg.svd(centred_WE, full_matrices=False).Vh.T
    codes_QWD = torch.zeros(QUERIES, len(embedding_WE), channels)
    codes_QWD[..., QUERIES : QUERIES + turned_WK.shape[1]] = torch.nn.functional.normalize(turned_WK, dim=-1)
    codes_QWD[..., :QUERIES] = torch.eye(QUERIES)[:, None]
    codes_QWD -= codes_QWD.mean(-1, keepdim=True)
    return torch.nn.functional.normalize(codes_QWD, dim=-1) * channels**0.5


def patch_ids(scene: Scene, pasted: list[tuple[int, Image.Image, tuple[int, int]]]) -> np.ndarray:
    """(N,) int64, row by row: the thing that a patch shows, else the background; indices into WORDS.

    `pasted` is what `drawing.draw` returns beside the picture.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    best = np.full((side, side), _COVERED)
    ids = np.full((side, side), _WORD_IDS[scene.background])
    for index, drawing, corner in pasted:
        ink = Image.new("L", (SIDE, SIDE))
        ink.paste(drawing.getchannel("A"), corner)
        share = np.asarray(ink.reduce(SIDE // side), dtype=np.float64) / 255
        ids = np.where(share > best, _WORD_IDS[scene.groups[index].thing.name], ids)
        best = np.maximum(best, share)
    return ids.reshape(-1)
