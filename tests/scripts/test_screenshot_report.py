"""A picture of a report: taken from the open page, refused with a reason where there is none."""

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "screenshot_report.py"
PAGE = """<!DOCTYPE html><meta charset="utf-8">
<select id="order"><option>best first</option><option>worst first</option></select>
<div id="gallery"></div>
<script>
for (let n = 0; n < 9; n++) {
  const card = document.createElement("article");
  card.style = "height: 400px; margin: 0";
  gallery.append(card);
}
</script>"""


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # scripts find each other in their own folder
    spec = importlib.util.spec_from_file_location("screenshot_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.usefixtures("chromium")
def test_picture_shows_as_many_images_as_asked(main, tmp_path):
    (tmp_path / "report.html").write_text(PAGE)
    arguments = [str(tmp_path / "report.html"), str(tmp_path / "a.png"), "--order", "worst first"]
    assert main([*arguments, "--images", "4", "--width", "700"]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 700
        assert 1600 < picture.height < 1700


def test_missing_report_is_named(main, tmp_path, capsys):
    assert main([str(tmp_path / "none.html"), str(tmp_path / "a.png")]) == 2
    assert "there is no file" in capsys.readouterr().err
