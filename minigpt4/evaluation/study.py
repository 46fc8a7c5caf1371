"""The table of an ablation: means over seeds, intervals, differences to the first row.

Its content, `table.json`, is plain types: `columns` by name, and `rows`, each with its `values` and `intervals` by
column and seed. No file but `timings.md` holds a time: the same results write the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.utils import as_json, write_whole
from minigpt4.evaluation.bootstrap import t_interval
from minigpt4.evaluation.report import Table, document, figure, under_headings

Interval = tuple[float, float]
Curve = tuple[str, list[str], list[tuple[int, float]]]
"""Stage, rows, and (step, loss) of a run."""

T_SEEDS, QUESTIONS, UNPAIRED = "t over seeds", "bootstrap over questions", "of both bootstraps, unpaired"
INTERVALS = {
    T_SEEDS: "Intervals: 95%, t over the seeds; differences are paired by seed.",
    QUESTIONS: "One seed: the intervals are the evaluation's own, 95% over its questions; what another seed would "
    "change is not in them.",
    UNPAIRED: "Differences with one seed: their intervals are put together from those of both rows, unpaired.",
}
FIGURE = "table.png"
SMOOTHED = 5
"""Lines of the log that a point of a curve is the mean of."""


# Numbers


def summarise(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By row and column: `mean`, `seeds`, `interval` and `kind` of interval; `difference` to the first row with
    `difference_interval` and `difference_kind`. None where there is nothing to say."""
    return [{column: _cell(row, rows[0], column) for column in columns} for row in rows]


def _cell(row: Mapping[str, Any], default: Mapping[str, Any], column: str) -> dict[str, Any]:
    own, first = (one["values"][column] for one in (row, default))
    ends, first_ends = (one["intervals"][column] for one in (row, default))
    values, known = [value for value in own if value is not None], [pair for pair in ends if pair is not None]
    interval, kind = t_interval(values), T_SEEDS
    if interval is None and known:
        interval, kind = known[0], QUESTIONS
    cell = {"mean": sum(values) / len(values) if values else None, "seeds": len(values), "interval": interval}
    cell |= {"kind": kind if interval else None, "difference": None, "difference_interval": None}
    cell["difference_kind"] = None
    paired = [a - b for a, b in zip(own, first, strict=True) if a is not None and b is not None]
    if row is not default and paired:
        interval, kind = t_interval(paired), T_SEEDS
        if interval is None:  # the one seed that both have
            pair = [four for four in zip(own, ends, first, first_ends, strict=True) if None not in four]
            interval, kind = _unpaired(*pair[0]) if pair else None, UNPAIRED
        cell |= {"difference": sum(paired) / len(paired), "difference_interval": interval}
        cell["difference_kind"] = kind if interval else None
    return cell


def _unpaired(value: float, ends: Interval, other: float, other_ends: Interval) -> Interval:
    """95% interval of a difference from the intervals of both.

    Source: R. G. Newcombe, Interval estimation for the difference between independent proportions, 1998, method 10.
    """
    low = math.hypot(value - ends[0], other_ends[1] - other)
    high = math.hypot(ends[1] - value, other - other_ends[0])
    return value - other - low, value - other + high


# Tables


def _text(value: float | None, digits: int, interval: Interval | None = None, sign: str = "") -> str:
    ends = f" ({interval[0]:{sign}.{digits}f}, {interval[1]:{sign}.{digits}f})" if interval else ""
    return "-" if value is None else f"{value:{sign}.{digits}f}{ends}"


def results_table(content: Mapping[str, Any], bold: str = "**{}**") -> Table:
    """Means with intervals, bold where that of the difference to the first row is without 0; published ones apart."""
    columns, rows = content["columns"], content["rows"]
    published = [name for name in columns if any(name in row["published"] for row in rows)]
    states, lines = any(row["state"] for row in rows), []
    for row, cells in zip(rows, content["summary"], strict=True):
        line = [row["name"], str(max((cell["seeds"] for cell in cells.values()), default=0))]
        for name, column in columns.items():
            text = _text(cells[name]["mean"], column["digits"], cells[name]["interval"])
            low, high = cells[name]["difference_interval"] or (0, 0)
            line.append(text if low <= 0 <= high else bold.format(text))
        line += [_text(row["published"].get(name), columns[name]["digits"]) for name in published]
        lines.append([*line, row["state"]] if states else line)
    head = ["row", "seeds", *columns, *(f"{name}, published" for name in published)]
    return Table([*head, "state"] if states else head, lines)


def _differences(content: Mapping[str, Any]) -> Table:
    columns, lines = content["columns"], []
    for row, cells in list(zip(content["rows"], content["summary"], strict=True))[1:]:
        own = [(cells[name], column["digits"]) for name, column in columns.items()]
        lines.append([row["name"], *(_text(c["difference"], d, c["difference_interval"], "+") for c, d in own)])
    return Table(["row", *columns], lines)


def _training(content: Mapping[str, Any]) -> Table:
    """What was trained, how much, and where the losses ended."""
    names = list(dict.fromkeys(stage for row in content["rows"] for stage in row["stages"]))
    lines = []
    for row in content["rows"]:
        line = [row["name"], *("-" if row[key] is None else f"{row[key]:,}" for key in ("parameters", "tokens"))]
        for name in names:
            stage = row["stages"].get(name)
            losses = [loss for loss in stage["losses"] if loss is not None] if stage else []
            line.append(f"{stage['steps']:,} x {stage['batch']:,}" if stage else "-")
            line.append(_text(sum(losses) / len(losses), 3, t_interval(losses)) if losses else "-")
        lines.append([*line, row["configuration"]])
    stages = [text for name in names for text in (f"{name}, steps x samples", f"{name}, loss")]
    return Table(["row", "trained parameters", "tokens an image", *stages, "configuration"], lines)


def _markdown(content: Mapping[str, Any]) -> str:
    cells = [cell for own in content["summary"] for cell in own.values()]
    kinds = {cell[kind] for cell in cells for kind in ("kind", "difference_kind")}
    first = content["rows"][0]["name"]
    notes = [text for kind, text in INTERVALS.items() if kind in kinds]
    notes.append(f"Bold: the interval of the difference to {first} is without 0.")
    notes.append("Losses are means of the last epoch; the configuration is its hash, without the seed.")
    notes += [f"Commit: {commit}." for commit in content["commits"]]
    notes += [f"{row['name']}: {text}" for row in content["rows"] for text in row["failures"]]
    tables = {f"Difference to {first}": _differences(content), "Training": _training(content)}
    changes = [(row["name"], ", ".join(f"`{text}`" for text in row["changes"])) for row in content["rows"]]
    rows = "".join(f"- {name}: {own or 'the recipes as they are'}\n" for name, own in changes)
    sections = [*under_headings(tables), f"## Rows\n\n{rows}", f"![losses and results]({FIGURE})"]
    return document(content["plan"], results_table(content), notes, sections)


def _latex(content: Mapping[str, Any]) -> str:
    """The table of results for booktabs."""
    table = results_table(content, "\0{}\1")
    marks = {"\\": r"\textbackslash{}", "\0": r"\textbf{", "\1": "}"} | {mark: f"\\{mark}" for mark in "&%$#_{}"}
    marks |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    rows = [" & ".join("".join(marks.get(c, c) for c in cell) for cell in line) for line in (table.head, *table.rows)]
    head, *body = (rf"{row} \\" for row in rows)
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


CSV_KEYS = ("mean", "low", "high", "kind", "seeds", "difference", "difference_low", "difference_high")


def _csv(content: Mapping[str, Any]) -> str:
    """All digits; a line for each row and column."""
    lines = []
    for row, cells in zip(content["rows"], content["summary"], strict=True):
        for name, cell in cells.items():
            ends, difference_ends = (cell[key] or (None, None) for key in ("interval", "difference_interval"))
            numbers = [cell["mean"], *ends, cell["kind"], cell["seeds"], cell["difference"], *difference_ends]
            published = row["published"].get(name)
            lines.append([row["name"], name, *numbers, cell["difference_kind"], published, row["configuration"]])
    return Table(["row", "column", *CSV_KEYS, "difference_kind", "published", "configuration"], lines).csv()


def _draw(path: Path, content: Mapping[str, Any], curves: Sequence[Curve]) -> None:
    """Write a PNG: a panel of losses for each stage, a panel of points with intervals for each column."""
    columns, rows, stages = content["columns"], content["rows"], list(dict.fromkeys(curve[0] for curve in curves))
    colours = {row["name"]: f"C{number % 10}" for number, row in enumerate(rows)}
    wide, title = max(len(stages), len(columns), 1), f"{content['plan']}; bars: 95% intervals, x: published"
    with figure(path, title, (2, wide), (3.6 * wide, 5.4 + 0.3 * len(rows)), "--output") as panels:
        for panel in [*panels[0][len(stages) :], *panels[1][len(columns) :]]:
            panel.set_visible(False)
        for panel, stage in zip(panels[0], stages, strict=False):
            for names, points in ((names, points) for name, names, points in curves if name == stage):
                steps, losses = zip(*points, strict=True)
                windows = [losses[max(0, end - SMOOTHED) : end] for end in range(1, len(losses) + 1)]
                means = [sum(window) / len(window) for window in windows]
                known = panel.get_legend_handles_labels()[1]
                label = None if ", ".join(names) in known else ", ".join(names)  # its other seeds
                panel.plot(steps, means, color=colours[names[0]], linewidth=0.8, label=label)
            panel.set_title(f"{stage}: loss", fontsize=9)
            panel.legend(fontsize=6)
        for panel, name in zip(panels[1], columns, strict=False):
            for place, (row, cells) in enumerate(zip(rows, content["summary"], strict=True)):
                colour, cell = colours[row["name"]], cells[name]
                if cell["mean"] is not None:
                    panel.plot(cell["mean"], place, marker="o", color=colour)
                if cell["interval"]:
                    panel.hlines(place, *cell["interval"], color=colour, linewidth=2)
                if name in row["published"]:
                    panel.plot(row["published"][name], place, marker="x", color="black")
            panel.set_title(name, fontsize=9)
            labels = [row["name"] if panel is panels[1][0] else "" for row in rows]
            panel.set_yticks(range(len(rows)), labels, fontsize=7)
            panel.set_ylim(len(rows) - 0.5, -0.5)
            panel.grid(alpha=0.3, axis="x")
        for panel in panels.flat:
            panel.tick_params(labelsize=7)


def write_study(
    folder: Path, content: dict[str, Any], curves: Sequence[Curve], timings: Sequence[Sequence[str]]
) -> str:
    """Write all files, `table.json` last; the text of `table.md`. ConfigError if the disk refuses."""
    content["summary"] = summarise(content["rows"], content["columns"])
    times = Table(["stage or evaluation", "s a step", "hours", "GPU memory, GiB"], timings)
    text = _markdown(content)
    files = {"table.md": text, "table.tex": _latex(content), "table.csv": _csv(content)}
    files["timings.md"] = document("Measured", times, ["Of the runs as they were, resumes included."], [])
    with errors_as(ConfigError, f"--output: cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    _draw(folder / FIGURE, content, curves)
    for name, own in (files | {"table.json": as_json(content)}).items():
        write_whole(folder / name, own, "--output")
    return text
