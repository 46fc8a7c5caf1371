"""Images without texts: which files, under which names."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.datasets.base_dataset import ImageReader
from minigpt4.inference.image_list import ImageList, find_images, images_to_caption, read_batches
from minigpt4.processors import Blip2ImageEvalProcessor

BROKEN = Path(__file__).parents[1] / "data" / "images"
READER = ImageReader(Blip2ImageEvalProcessor(image_size=28))


@pytest.fixture
def folder(tmp_path):
    """Three images, one in a subfolder, and a text."""
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.JPG", "more/a.jpg"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_gives_its_images_and_those_of_subfolders_by_name(folder):
    assert [item.image_id for item in find_images(folder, None, None, 0)] == ["a.JPG", "b.png", "more/a.jpg"]


def test_list_keeps_its_order_and_its_ids(folder):
    file = folder / "list.json"
    file.write_text(json.dumps(["b.png", {"image": "more/a.jpg", "image_id": 7}]))
    assert [(i.image_id, i.file) for i in find_images(file, None, None, 0)] == [
        ("b.png", folder / "b.png"),
        ("7", folder / "more" / "a.jpg"),
    ]


def test_id_alone_is_the_name_of_a_jpg_in_the_folder_of_images(folder):
    file = folder / "list.json"
    file.write_text('[{"image_id": "a", "caption": "A red field."}]')
    assert find_images(file, folder / "more", None, 0)[0].file == folder / "more" / "a.jpg"


def test_id_that_comes_twice_is_an_error(folder):
    file = folder / "list.json"
    file.write_text('["b.png", {"image": "a.JPG", "image_id": "b.png"}]')
    with pytest.raises(SampleError, match=r"list\.json, entry 2: the image id 'b\.png' comes twice"):
        find_images(file, None, None, 0)


def test_limit_draws_by_the_seed_and_keeps_the_order(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"")
    drawn = [[item.image_id for item in find_images(tmp_path, None, 5, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(own) == 5 and own == sorted(own) for own in drawn)
    assert len(find_images(tmp_path, None, 100, 0)) == 20


@pytest.mark.parametrize("text", ['["a.jpg"', "[" * 100_000, "\ufeff7", '{"image": "a.jpg"}'])
def test_list_that_is_none_is_named(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--images: .*list\.json: (neither a folder nor JSON|must hold a list)"):
        find_images(tmp_path / "list.json", None, None, 0)


def test_list_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "list.json")
    with pytest.raises(ConfigError, match=r"--images: .*list\.json: cannot be read: it is neither"):
        images_to_caption([tmp_path / "list.json"])


def test_evaluation_names_the_file_that_a_decoder_fails_on(tmp_path):
    for file in BROKEN.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = ImageList(find_images(tmp_path, None, None, 0), READER)
    ((pixels, errors),) = read_batches(images, [[0, 1]], num_workers=1)
    assert len(pixels) == 0
    assert [number for number, error in errors.items() if images.items[number].file.name in error] == [0, 1]


def test_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="--images: .* has no images; known endings: .avif"):
        find_images(tmp_path, None, None, 0)
    with pytest.raises(ConfigError, match="--images: .*none: cannot be read"):
        find_images(tmp_path / "none", None, None, 0)


def test_batches_hold_every_image_once_and_damaged_ones_are_named(folder):
    images = ImageList(find_images(folder, None, None, 0), READER)
    assert images.batches(2) == [[0, 1], [2]]
    assert images.image(2).shape == (3, 28, 28)
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(SampleError, match=r"b\.png: not an image"):
        images.image(1)


# Images to caption


def _named(*arguments):
    base, found = images_to_caption(*arguments)
    return base, [(item.image_id, item.name) for item in found]


def test_ids_of_captions_are_names_without_folder_and_ending_where_no_two_share_one(folder):
    assert _named([folder]) == (folder, [("a.JPG", "a.JPG"), ("b", "b.png"), ("more/a.jpg", "more/a.jpg")])


def test_text_list_has_a_file_a_line_and_may_name_files_that_are_missing(folder):
    file = folder / "list.txt"
    file.write_text("b.png\n\n  more/a.jpg \nnothing.png\n")
    assert _named([file]) == (folder, [("b", "b.png"), ("a", "more/a.jpg"), ("nothing", "nothing.png")])
    assert _named([file], folder / "more") == (folder / "more", _named([file])[1])
    with pytest.raises(SampleError, match=r"list\.txt, line 4: the image .*nothing\.png does not exist"):
        find_images(file, None, None, 0)


def test_json_list_keeps_the_ids_that_it_gives(folder):
    file = folder / "list.json"
    file.write_text('[{"image": "b.png", "image_id": 7}, {"image_id": "a"}]')
    assert _named([file])[1] == [("7", "b.png"), ("a", "a.jpg")]


def test_several_files_are_images_by_their_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert _named([Path("b.png"), Path("more/a.jpg")]) == (folder, [("b", "b.png"), ("a", "more/a.jpg")])
    assert _named([Path("b.png")])[1] == [("b", "b.png")]
    with pytest.raises(ConfigError, match=r"notes\.txt is no image file"):
        images_to_caption([Path("b.png"), Path("notes.txt")])


def test_image_to_caption_that_comes_twice_is_an_error(folder):
    file = folder / "list.json"
    file.write_text('[{"image": "b.png", "image_id": 1}, {"image": "b.png", "image_id": 2}]')
    with pytest.raises(SampleError, match=r"list\.json, entry 2: the image 'b\.png' comes twice"):
        images_to_caption([file])
