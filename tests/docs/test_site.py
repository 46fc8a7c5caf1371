"""The docs site builds without a warning, and its pages load nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("material", reason='mkdocs-material is missing: pip install -e ".[docs]"')


def build(root: Path, target: Path) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True)


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {file.relative_to(tmp_path).as_posix(): file.read_text() for file in tmp_path.rglob("*.html")}
    assert len(pages) > len(list(ROOT.glob("docs/*.md")))
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", page)
        assert loaded == [], name
    assert "MiniGPT-4 and LLaVA</h1>" in re.sub(r"<a .*?</a>", "", pages["index.html"])
    assert "use_checkpoint" in pages["api/index.html"]
    assert 'href="mini/"' in pages["index.html"]


def test_broken_links_and_anchors_and_forgotten_pages_are_found(tmp_path):
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "minigpt4").symlink_to(ROOT / "minigpt4")
    faults = {"README.md": "docs/gone.md", "docs/export.md": "chat.md#gone", "CHANGELOG.md": "docs/gone.png"}
    for name, target in faults.items():
        with (tmp_path / name).open("a") as file:
            file.write(f"\n[x]({target})\n")
    (tmp_path / "docs/forgotten.md").touch()
    said = build(tmp_path, tmp_path / "site").stderr
    for word in ("'gone.md'", "'chat.md#gone'", "'gone.png'", "forgotten.md"):
        assert word in said
