"""How good captions are: the published metrics by pycocoevalcap."""

from minigpt4.evaluation.metrics import METRICS, require_caption_metrics, score_captions

__all__ = ["METRICS", "require_caption_metrics", "score_captions"]
