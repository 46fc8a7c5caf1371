"""Image features that frozen weights give, kept on disk; cache.py, which needs a model, is imported by itself."""

from minigpt4.features.batch import ImageRow, PartialFeatures, join_images
from minigpt4.features.store import FeatureStore, RowShape, image_digest

__all__ = ["FeatureStore", "ImageRow", "PartialFeatures", "RowShape", "image_digest", "join_images"]
