"""Image features that frozen weights give, kept on disk."""

from minigpt4.features.store import FeatureStore, RowShape, image_digest

__all__ = ["FeatureStore", "RowShape", "image_digest"]
