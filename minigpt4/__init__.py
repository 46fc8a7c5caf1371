"""MiniGPT-4: a frozen EVA-ViT and Q-Former, one trained linear layer, a frozen LLM.

Importing the package is cheap: torch and transformers load with the part that needs them.
"""

__version__ = "0.1.0"
