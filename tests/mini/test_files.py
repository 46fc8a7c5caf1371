import csv
import json

import pytest

from minigpt4.mini.files import TRUTH_FILE, WORLD_FILE, WorldSize, write_world
from minigpt4.mini.scenes import five_captions, sample_scene

SIZE = WorldSize(stage1=5, stage2=3, flickr_train=4, flickr_val=2, flickr_test=3, per_shard=2, seed=7)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    assert write_world(folder, SIZE)
    return folder


def test_a_world_is_left_alone_but_written_anew_where_it_was_not_finished_or_is_of_other_sizes(world, tmp_path):
    assert not write_world(world, SIZE)
    folder = tmp_path / "world"
    write_world(folder, SIZE)
    (folder / WORLD_FILE).unlink()
    (folder / "stage1" / "00000.tar").write_bytes(b"cut off")
    assert write_world(folder, SIZE)
    assert contents(folder) == contents(world)
    assert write_world(folder, WorldSize(stage1=2, stage2=1, flickr_train=1, flickr_val=1, flickr_test=1, per_shard=2))
    assert len(list((folder / "stage1").iterdir())) == 1


def test_the_csv_has_the_columns_of_flickr30k_and_five_captions_an_image(world):
    with (world / "flickr30k" / "flickr_annotations_30k.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val"] * 2 + ["test"] * 3
    assert json.loads(rows[-1]["raw"]) == five_captions(sample_scene("test", 2, SIZE.seed))
    assert all((world / "flickr30k" / "flickr30k-images" / row["filename"]).is_file() for row in rows)


def test_no_training_scene_is_used_in_two_stages(world):
    rows = (world / "flickr30k" / "flickr_annotations_30k.csv").read_text()
    for index in range(SIZE.stage1 + SIZE.stage2):
        assert json.dumps(five_captions(sample_scene("train", index, SIZE.seed)))[1:-1] not in rows.replace('""', '"')


def test_the_truth_of_the_test_images_is_kept(world):
    truth = json.loads((world / TRUTH_FILE).read_text())
    assert list(truth.values()) == [sample_scene("test", index, SIZE.seed).record() for index in range(3)]
    assert all((world / "flickr30k" / "flickr30k-images" / f"{image_id}.jpg").is_file() for image_id in truth)
