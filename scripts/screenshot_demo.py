"""A picture of the chat page: it is opened, shown an image, and asked a question, as a visitor would.

    python demo.py --cfg-path eval_configs/mini_eval.yaml --port 7860
    python scripts/screenshot_demo.py http://127.0.0.1:7860 docs/demo.png --image photo.jpg --question "What is this?"
Needs Chromium, a font and playwright: apt-get install chromium fonts-dejavu-core; pip install playwright
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from screenshots import browser_page, take_colours

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import exit_status

if TYPE_CHECKING:
    from playwright.sync_api import Page

COLOURS = 200
"""In the picture."""
PATIENCE = 600_000
"""For an answer, ms."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the page, as demo.py prints it")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--image", type=Path, action="append", default=[], help="to show; one for each question")
    parser.add_argument("--question", action="append", help='to ask ("Describe this image in detail.")')
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely answer (0)")
    parser.add_argument("--width", type=int, default=1280, help="of the window, pixels (1280)")
    parser.add_argument("--height", type=int, default=960, help="of the window, pixels (960)")
    return parser.parse_args(argv)


def take(args: argparse.Namespace) -> None:
    """Write the picture; ConfigError without an image, a browser or a page."""
    for image in args.image:
        if not image.is_file():
            raise ConfigError(f"there is no file {image}")
    with browser_page(args.width, args.height) as page:
        page.set_default_timeout(PATIENCE)
        _open(page, args.address)
        _talk(page, args)
        page.mouse.move(0, 0)  # what it is over looks different
        page.screenshot(path=args.picture)
    take_colours(args.picture, COLOURS)


def _open(page: "Page", address: str) -> None:
    from playwright.sync_api import Error

    try:
        page.goto(address)
    except Error as error:
        raise ConfigError(f"{address} cannot be opened; start demo.py first") from error


def _talk(page: "Page", args: argparse.Namespace) -> None:
    """Ask, and wait for the answers and their images."""
    temperature = page.get_by_label("number input for Temperature")
    temperature.fill(str(args.temperature))
    temperature.press("Enter")
    for number, question in enumerate(args.question or ["Describe this image in detail."]):
        if number < len(args.image):
            page.locator("#image input[type=file]").set_input_files(args.image[number])
            page.locator("#image img").wait_for()
        page.get_by_label("Question").fill(question)
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator("#chat").get_by_test_id("bot").nth(number).wait_for()
        page.wait_for_function("() => [...document.querySelectorAll('button.stop')].every(button => button.disabled)")
    page.wait_for_function("() => [...document.querySelectorAll('#chat img')].every(image => image.complete)")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return exit_status(lambda: take(args))


if __name__ == "__main__":
    sys.exit(main())
