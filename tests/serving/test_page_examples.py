import json

from PIL import Image

from minigpt4.serving.page import examples


def test_without_the_mini_world_there_are_drawings(tmp_path):
    found = examples(tmp_path / "drawn", world=tmp_path / "nowhere")
    assert len(found) == 4
    for path in found:
        with Image.open(path) as image:
            assert len(image.getcolors()) > 1


def test_test_scenes_of_several_things_are_shown_where_they_are(tmp_path):
    images = tmp_path / "flickr30k" / "flickr30k-images"
    images.mkdir(parents=True)
    groups = {"1": 1, "2": 2, "3": 3, "4": 2}
    (tmp_path / "scenes_test.json").write_text(json.dumps({n: {"groups": [{}] * k} for n, k in groups.items()}))
    for name in ("1", "2", "3"):
        Image.new("RGB", (8, 8)).save(images / f"{name}.jpg")
    assert [path.name for path in examples(tmp_path, world=tmp_path)] == ["2.jpg", "3.jpg"]
