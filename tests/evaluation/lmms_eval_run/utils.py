"""What the tasks of the test look up by `!function`."""

from typing import Any

from PIL import Image


def images(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(name) for name in doc["images"]]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"length": float(len(results[0]))}
