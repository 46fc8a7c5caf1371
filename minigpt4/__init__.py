"""MiniGPT-4: a frozen EVA-ViT and Q-Former, one trained linear layer, a frozen LLM.

Importing the package is cheap: torch and transformers load with the part that needs them.

    from minigpt4 import pipeline    # minigpt4/inference/pipeline.py
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4.inference.pipeline import pipeline as pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "pipeline"]


def __getattr__(name: str) -> Any:
    """`pipeline`, imported when somebody asks for it."""
    if name != "pipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minigpt4.inference.pipeline import pipeline

    return pipeline
