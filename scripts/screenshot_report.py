"""A picture of a `report.html` of an evaluation: its top, its tables and the first images of the gallery.

    python scripts/screenshot_report.py RUN/evaluation/report.html docs/report.png
    python scripts/screenshot_report.py report.html worst.png --order "worst first" --images 5 --search dog
Needs Chromium, a font and playwright: apt-get install chromium fonts-dejavu-core; pip install playwright
"""

import argparse
import sys
from pathlib import Path

from screenshots import browser_page, take_colours

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import exit_status

COLOURS = 64
"""In the picture."""
HEIGHT = 900
"""Of the window, pixels; the picture is as high as the page."""
HIDE = "#gallery article:nth-child(n + {first}), #more {{ display: none }} .controls {{ position: static !important }}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.html of an evaluation")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--images", type=int, default=3, help="images of the gallery in the picture (3)")
    parser.add_argument("--order", help="order of the gallery, as the page names it (best first)")
    parser.add_argument("--search", help="words for the gallery's search")
    parser.add_argument("--width", type=int, default=1100, help="of the window, pixels (1100)")
    return parser.parse_args(argv)


def take(args: argparse.Namespace) -> None:
    """Write the picture; ConfigError without a report or a browser."""
    if not args.report.is_file():
        raise ConfigError(f"there is no file {args.report}")
    with browser_page(args.width, HEIGHT) as page:
        page.goto(args.report.resolve().as_uri())
        if args.order:
            page.locator("#order").select_option(label=args.order)
        if args.search:
            page.locator("#search").fill(args.search)
        page.evaluate(
            "css => document.head.append(Object.assign(document.createElement('style'), {textContent: css}))",
            HIDE.format(first=args.images + 1),
        )
        page.screenshot(path=args.picture, full_page=True)
    take_colours(args.picture, COLOURS)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return exit_status(lambda: take(args))


if __name__ == "__main__":
    sys.exit(main())
