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
    """Three images, one in a subfolder, a text, and what macOS puts beside an image."""
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.JPG", "more/a.jpg"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._b.png").write_bytes(b"\0\5\x16\7")
    return tmp_path


def _list(folder, content, name="list.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_folder_gives_its_images_by_name_and_a_list_keeps_its_order_and_ids(folder):
    assert [item.image_id for item in find_images(folder, None, None, 0)] == ["a.JPG", "b.png", "more/a.jpg"]
    found = find_images(_list(folder, ["b.png", {"image": "more/a.jpg", "image_id": 7}]), None, None, 0)
    found = [(item.image_id, item.file) for item in found]
    assert found == [("b.png", folder / "b.png"), ("7", folder / "more" / "a.jpg")]
    file = _list(folder, '[{"image_id": "a", "caption": "A red field."}]')
    assert find_images(file, folder / "more", None, 0)[0].file == folder / "more" / "a.jpg"


def test_limit_draws_by_the_seed_and_keeps_the_order(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"")
    drawn = [[item.image_id for item in find_images(tmp_path, None, 5, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(own) == 5 and own == sorted(own) for own in drawn)
    assert len(find_images(tmp_path, None, 100, 0)) == 20


def test_source_that_is_none_is_named(tmp_path):
    for text in ('["a.jpg"', "[" * 100_000, "\ufeff7", '{"image": "a.jpg"}'):
        with pytest.raises(ConfigError, match=r"--images: .*list\.json: (neither a folder nor JSON|must hold a list)"):
            find_images(_list(tmp_path, text), None, None, 0)
    os.mkfifo(tmp_path / "pipe.json")
    for name, complaint in (("pipe.json", "cannot be read: it is neither"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=f"--images: .*{name}: {complaint}"):
            images_to_caption([tmp_path / name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="--images: .* has no images; known endings: .avif"):
        find_images(tmp_path / "empty", None, None, 0)


def test_batches_hold_every_image_once_and_damaged_ones_fail_alone(folder):
    images = ImageList(find_images(folder, None, None, 0), READER)
    assert images.batches(2) == [[0, 1], [2]]
    (folder / "b.png").write_bytes(b"no image")
    for file in BROKEN.iterdir():
        (folder / f"z{file.name}").write_bytes(file.read_bytes())
    images = ImageList(find_images(folder, None, None, 0), READER)
    (first, errors), (second, more) = read_batches(images, [[0, 1, 2], [3, 4]], num_workers=1)
    assert (first.shape, second.shape) == ((2, 3, 28, 28), (0,))
    named = [number for number, error in (errors | more).items() if images.items[number].file.name in error]
    assert named == [1, 3, 4]


# Images to caption


def _named(*arguments):
    base, found = images_to_caption(*arguments)
    return base, [(item.image_id, item.name) for item in found]


def test_ids_of_captions_are_names_without_folder_and_ending_where_no_two_share_one(folder):
    assert _named([folder]) == (folder, [("a.JPG", "a.JPG"), ("b", "b.png"), ("more/a.jpg", "more/a.jpg")])
    file = _list(folder, [{"image": "b.png", "image_id": 7}, {"image_id": "a"}])
    assert _named([file])[1] == [("7", "b.png"), ("a", "a.jpg")]


def test_text_list_has_a_file_a_line_and_may_name_files_that_are_missing(folder):
    file = _list(folder, "b.png\n\n  more/a.jpg \nnothing.png\n", "list.txt")
    assert _named([file]) == (folder, [("b", "b.png"), ("a", "more/a.jpg"), ("nothing", "nothing.png")])
    assert _named([file], folder / "more") == (folder / "more", _named([file])[1])
    with pytest.raises(SampleError, match=r"list\.txt, line 4: the image .*nothing\.png does not exist"):
        find_images(file, None, None, 0)


def test_several_files_are_images_by_their_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert _named([Path("b.png"), Path("more/a.jpg")]) == (folder, [("b", "b.png"), ("a", "more/a.jpg")])
    assert _named([Path("b.png")])[1] == [("b", "b.png")]
    with pytest.raises(ConfigError, match=r"notes\.txt is no image file"):
        images_to_caption([Path("b.png"), Path("notes.txt")])


def test_image_or_id_that_comes_twice_is_an_error(folder):
    for first, second, twice in (
        ("b.png", {"image": "a.JPG", "image_id": "b.png"}, "image id"),
        ({"image": "b.png", "image_id": 1}, {"image": "b.png", "image_id": 2}, "image"),
    ):
        with pytest.raises(SampleError, match=rf"list\.json, entry 2: the {twice} 'b\.png' comes twice"):
            images_to_caption([_list(folder, [first, second])])
