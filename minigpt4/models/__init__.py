"""Models by name; importing this package registers the shipped one."""

from minigpt4.models.base_model import BaseModel
from minigpt4.models.mini_gpt4 import MiniGPT4, VisionLanguageModel

__all__ = ["BaseModel", "MiniGPT4", "VisionLanguageModel"]
