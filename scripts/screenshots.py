"""What the screenshot scripts share: a page in Chromium, and a small file. No command of its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from minigpt4.common.errors import ConfigError

if TYPE_CHECKING:
    from playwright.sync_api import Page


@contextmanager
def browser_page(width: int, height: int) -> "Iterator[Page]":
    """An empty page of so many pixels; ConfigError without Chromium or playwright."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise ConfigError("there is no chromium on the PATH: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ConfigError("the package playwright is missing: pip install playwright") from error
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--disable-dev-shm-usage"])
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()


def take_colours(file: Path, colours: int) -> None:
    """Write a picture anew with so many colours: a third of the bytes, and no eye sees it."""
    with Image.open(file) as picture:
        few = picture.convert("RGB").quantize(colours)
    few.save(file, optimize=True)
