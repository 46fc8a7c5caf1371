"""The line chart of metrics over checkpoints."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.evaluation.tables import Scores


def require_figures(key: str) -> None:
    """ConfigError naming `key` unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f'{key}: the chart needs the package matplotlib; pip install -e ".[eval]" brings it')


def draw_metrics(path: Path, rows: Mapping[str, Scores], metrics: Sequence[str], title: str) -> None:
    """Write a PNG (1200 x 750 pixels) with a line for each metric and a place for each checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    places = range(len(rows))
    for metric in metrics:
        axes.plot(places, [scores.get(metric) for scores in rows.values()], marker="o", label=metric)
    axes.set_xticks(list(places), list(rows), rotation=20 if len(rows) > 6 else 0)
    axes.set_ylabel("score")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})  # the same numbers give the same bytes
    pyplot.close(figure)
