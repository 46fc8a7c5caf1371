import math

import pytest
from PIL import Image

from minigpt4.mini.report import draw_figure, lost


def test_what_shuffling_costs_is_a_share_of_the_score_unless_that_is_chance():
    assert lost(2.0, 0.5) == pytest.approx(0.75)
    assert math.isnan(lost(0.0, 0.0))
    assert math.isnan(lost(0.001, 0.2))


def test_the_figure_shows_the_first_scenes_with_their_captions(tmp_path):
    captions = {f"{number}": f"caption {number}" for number in range(8)}
    for image_id in captions:
        Image.new("RGB", (224, 224), "red").save(tmp_path / f"{image_id}.jpg")
    draw_figure(tmp_path / "figure.png", tmp_path, captions)
    with Image.open(tmp_path / "figure.png") as figure:
        reds = sum(
            figure.getpixel((16 + column * 240 + 100, 16 + row * 374 + 100))[0] > 200
            and figure.getpixel((16 + column * 240 + 100, 16 + row * 374 + 100))[2] < 60
            for column in range(3)
            for row in range(2)
        )
    assert reds == 6
