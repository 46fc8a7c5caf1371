"""Image features that frozen weights give, kept on disk."""

from minigpt4.features.batch import ImageRow, PartialFeatures
from minigpt4.features.cache import FeatureCache, FeatureFiller
from minigpt4.features.store import FeatureStore, RowShape, image_digest

__all__ = [
    "FeatureCache",
    "FeatureFiller",
    "FeatureStore",
    "ImageRow",
    "PartialFeatures",
    "RowShape",
    "image_digest",
]
