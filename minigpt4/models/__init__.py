"""Models by name; importing this package registers the shipped one."""

from minigpt4.models.minigpt4 import MiniGPT4

__all__ = ["MiniGPT4"]
