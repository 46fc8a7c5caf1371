"""Using a trained model: answers to many conversations at once."""

from minigpt4.inference.engine import BusyError, Engine

__all__ = ["BusyError", "Engine"]
