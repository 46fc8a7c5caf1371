"""Sizes of the mini vision encoder and Q-Former, and the words that their queries learned to predict.

Shapes: B scenes, N patches, Q = 8 queries. Query 0 says the background, query 1 the layout; then, for each of three
places in reading order, one query says the kind of thing and the next one says number and size.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from minigpt4.mini.drawing import SIDE
from minigpt4.mini.scenes import ALONE, COLUMN, LARGE, ROW, SMALL, Scene
from minigpt4.mini.things import BACKGROUNDS, THINGS

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
_AMOUNTS = tuple(f"{count} {size}" for count in (1, 2, 3) for size in (SMALL, LARGE))
WORDS = (NOTHING, *BACKGROUNDS, ALONE, ROW, COLUMN, *(thing.name for thing in THINGS), *_AMOUNTS)
"""Everything that a query can say."""
_WORD_IDS = {word: index for index, word in enumerate(WORDS)}
_COVERED = 0.15  # a patch belongs to a thing that inks at least this share of it


def words(scene: Scene) -> list[str]:
    """The Q words of a scene."""
    said = [scene.background, scene.layout]
    for group in scene.groups:
        said += [group.thing.name, f"{group.count} {group.size}"]
    return said + [NOTHING] * (QUERIES - len(said))


def word_ids(scene: Scene) -> np.ndarray:
    """(Q,) int64, indices into WORDS."""
    return np.array([_WORD_IDS[word] for word in words(scene)])


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
