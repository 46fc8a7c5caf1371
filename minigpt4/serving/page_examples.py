"""Images for visitors who have none at hand: test scenes of the mini world where it was made, else drawings."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from minigpt4.mini.files import TRUTH_FILE

WORLD = Path("data/mini")
SHOWN = 4
_SIDE = 448


def examples(folder: Path, world: Path = WORLD) -> list[Path]:
    """The images' files; drawings are put into `folder`."""
    return _test_scenes(world) or _drawings(folder)


def _test_scenes(world: Path) -> list[Path]:
    """Scenes of several things, which no model was trained on."""
    try:
        scenes = json.loads((world / TRUTH_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    files = [
        world / "flickr30k" / "flickr30k-images" / f"{image_id}.jpg"
        for image_id, scene in scenes.items()
        if len(scene["groups"]) > 1
    ]
    return [file for file in files if file.is_file()][:SHOWN]


def _drawings(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for draw in (_house, _traffic_light, _chart, _boat):
        picture = Image.new("RGB", (_SIDE, _SIDE), "white")
        draw(ImageDraw.Draw(picture))
        paths.append(folder / f"{draw.__name__.strip('_')}.png")
        picture.save(paths[-1])
    return paths


def _house(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((0, 0, 448, 448), "#bfe3ff")
    pen.rectangle((0, 320, 448, 448), "#6fbf5f")
    pen.ellipse((330, 30, 410, 110), "#ffd23f")
    pen.rectangle((90, 200, 270, 350), "#f2e3c6", "#6b4f3a", 4)
    pen.polygon([(70, 205), (180, 110), (290, 205)], "#b5402f")
    pen.rectangle((160, 265, 205, 350), "#6b4f3a")
    pen.rectangle((110, 225, 145, 260), "#8ecdf0", "#6b4f3a", 4)
    pen.rectangle((345, 250, 365, 350), "#7a5230")
    pen.ellipse((305, 150, 405, 270), "#2f8f46")


def _traffic_light(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((0, 0, 448, 448), "#d9dde2")
    pen.rectangle((0, 360, 448, 448), "#6e7278")
    pen.rectangle((212, 300, 236, 400), "#333a40")
    pen.rounded_rectangle((164, 40, 284, 310), 24, "#333a40")
    for top, colour in ((58, "#e5383b"), (142, "#5c5434"), (226, "#33503c")):
        pen.ellipse((188, top, 260, top + 72), colour)


def _chart(pen: ImageDraw.ImageDraw) -> None:
    for index, (height, colour) in enumerate(((90, "#4c78a8"), (160, "#f58518"), (230, "#54a24b"), (310, "#e45756"))):
        pen.rectangle((80 + 85 * index, 390 - height, 135 + 85 * index, 390), colour)
    pen.line([(60, 50), (60, 390), (420, 390)], "#222222", 5)


def _boat(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((0, 0, 448, 448), "#ffcf99")
    pen.ellipse((60, 150, 160, 250), "#ff7b54")
    pen.rectangle((0, 290, 448, 448), "#2a6f97")
    pen.polygon([(150, 290), (350, 290), (310, 345), (190, 345)], "#7a4a2b")
    pen.line([(245, 290), (245, 90)], "#4a2f1b", 8)
    pen.polygon([(255, 95), (255, 270), (345, 270)], "#fdfcf7")
