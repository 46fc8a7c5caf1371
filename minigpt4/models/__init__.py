"""Models by name; importing this package registers the shipped one."""

from minigpt4.models.mini_gpt4 import MiniGPT4

__all__ = ["MiniGPT4"]
