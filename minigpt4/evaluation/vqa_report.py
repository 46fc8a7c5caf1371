"""What an evaluation of a benchmark leaves in its folder, and the table of all benchmarks there.

gqa.json               accuracies, intervals, differences, tables by type, and how all of it was measured
gqa_worst.md           the worst answers by type
answers_gqa_CKPT.json  the answers, as the benchmark wants them handed in
vqa.md                 the table: checkpoints and published rows by benchmark
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.utils import write_json, write_whole
from minigpt4.evaluation.bootstrap import DRAWS, Bootstrap
from minigpt4.evaluation.command import NamedCheckpoint
from minigpt4.evaluation.metrics import CaptionScores
from minigpt4.evaluation.questions import read_json
from minigpt4.evaluation.report import Table, document, score_table
from minigpt4.evaluation.vqa import BENCHMARKS, PUBLISHED, Benchmark, Rank, Scores, Texts
from minigpt4.evaluation.vqa_data import Files, QuestionSet, VqaQuestion

LONG = 5
"""Words; the share of answers with more explains most zeros."""
WORST = 50
"""Answers that are listed of each type."""
FIRST_LINE = re.compile(r"\n|\.(?!\d)")


@dataclass(frozen=True)
class Rules:
    """What the user chose."""

    scorer: str = "official"
    """Whose rules count; a benchmark's first where it has no such."""
    rank: Rank = "sum"
    partial: bool = False
    first_line: bool = False
    """Answers that are no choices end before the first line break or full stop."""


def write_report(
    name: str,
    files: Files,
    read: QuestionSet,
    rows: Sequence[tuple[NamedCheckpoint, Mapping[str, Texts]]],
    rules: Rules,
    setup: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Write all files of a benchmark and, anew, the table of the folder; returns the content of the JSON file.

    `rows`: of each checkpoint its answers by what gave them, one or the rules of a ranking; `setup`: prompt, decoding
    and so on, the same for all. ConfigError if the disk refuses.
    """
    benchmark, checkpoints, scores, worst = BENCHMARKS[name], [], [], []
    has_gold = all(benchmark.gold in one.record for one in read.questions)
    scorer = rules.scorer if rules.scorer in benchmark.rules else next(iter(benchmark.rules))
    cuts = rules.first_line and not benchmark.is_ranked
    for one, said in rows:
        if cuts:
            said = {
                way: {k: FIRST_LINE.split(text, maxsplit=1)[0] for k, text in own.items()} for way, own in said.items()
            }
        chosen = said.get(rules.rank) or next(iter(said.values()))
        path = folder / f"answers_{name}_{one.file_name}.{'jsonl' if benchmark.form.kind == 'lines' else 'json'}"
        benchmark.form.write(path, chosen)
        checkpoints.append({**one.identity, "answers": path.name, **_shares(benchmark, chosen)})
        if has_gold:
            leaves_out = rules.partial and not benchmark.missing_is_wrong
            asked = [one for one in read.questions if one.question_id in chosen or not leaves_out]
            scores.append(benchmark.score(scorer, chosen, asked))
            others = {rule: benchmark.score(rule, chosen, asked) for rule in benchmark.rules}
            ways = {way: benchmark.score(scorer, texts, asked) for way, texts in said.items()}
            checkpoints[-1] |= {
                "accuracy": _mean(scores[-1].values()),
                "scores": {way: _mean(own.values()) for way, own in (others if len(ways) == 1 else ways).items()},
                "groups": _by_type(asked, scores[-1]),
                "figures": benchmark.figures(scorer, chosen, asked, files),
            }
            worst.append(_worst(benchmark, one.name, read.questions, scores[-1], chosen))
    missing = "count 0" if benchmark.missing_is_wrong else "do not count"
    results = {
        "benchmark": name,
        "questions": len(scores[0]) if scores else len(read.questions),
        "images": len({one.image for one in read.questions}),
        "file": str(files.questions),
        "sha256": files.hashes(),
        "form": read.form,
        "split": read.split or files.questions.stem,
        "scorer": scorer,
        "rule": benchmark.rules[scorer] + (f"; {rules.rank} of the losses" if benchmark.is_ranked else ""),
        "answer": "up to the first line break or full stop" if cuts else "whole",
        "partial": f"of {len(read.questions):,}, questions without an answer {missing}" if rules.partial else None,
        "setup": setup,
        "baselines": _baselines(read.questions) if has_gold and benchmark.is_ranked else {},
        "comparisons": _compare(read.questions, checkpoints, scores),
        "checkpoints": checkpoints,
    }
    write_json(folder / f"{name}.json", results, "--save_path")
    if worst:
        write_whole(folder / f"{name}_worst.md", f"# {benchmark.title}: the worst answers by type\n\n{''.join(worst)}")
    write_whole(folder / "vqa.md", markdown(folder))
    return results


def _shares(benchmark: Benchmark, said: Texts) -> dict[str, Any]:
    """Of the answers, those that are long, empty or, where there are two to choose from, neither."""
    found = {"long": _mean(len(text.split()) > LONG for text in said.values())}
    found["empty"] = _mean(not text.strip() for text in said.values())
    if benchmark.is_read:
        found["neither"] = _mean(not benchmark.is_read(text) for text in said.values())
    return found


def _by_type(questions: Sequence[VqaQuestion], scores: Scores) -> dict[str, dict[str, list[float]]]:
    """Mean score and number of questions by the types that tables tell apart."""
    groups = defaultdict(lambda: defaultdict(list))
    for one in [one for one in questions if one.question_id in scores]:
        for name, value in one.groups.items():
            groups[name][str(value)].append(scores[one.question_id])
    return {name: {v: [_mean(own), len(own)] for v, own in sorted(by.items())} for name, by in groups.items()}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _baselines(questions: Sequence[VqaQuestion]) -> dict[str, float]:
    """Accuracy without a look at image or question; of choices as long, or short, as each other the first."""
    lengths = [list(map(len, one.record["choices"])) for one in questions]
    gold = [one.record.get("correct_choice_idx", one.record.get("answer")) for one in questions]
    found = {"chance": _mean(1 / len(own) for own in lengths)}
    for name, pick in (("longest choice", max), ("shortest choice", min)):
        found[name] = _mean(own.index(pick(own)) == right for own, right in zip(lengths, gold, strict=True))
    return found


def _compare(
    questions: Sequence[VqaQuestion], checkpoints: Sequence[dict[str, Any]], scores: Sequence[Scores]
) -> list[dict[str, Any]]:
    """Each checkpoint gets its `interval`, None for a single image; returned are differences from those above that
    answered the same questions. The questions of an image are drawn together."""
    images = {one.question_id: one.image or f"{one.question_id}, without image" for one in questions}
    comparisons, counted = [], []
    for index, own in enumerate(scores):
        sums = defaultdict(lambda: np.zeros(2))
        for key, score in own.items():
            sums[images[key]] += score, 1
        counts = {"accuracy": np.array(list(sums.values()))}
        counted.append(CaptionScores({"accuracy": checkpoints[index]["accuracy"]}, {}, counts))
        same = [base for base in range(index) if scores[base].keys() == own.keys()]
        bootstrap = Bootstrap([counted[place] for place in (index, *same)], len(sums)) if len(sums) > 1 else None
        checkpoints[index]["interval"] = bootstrap and bootstrap.intervals(0)["accuracy"]
        for place, base in enumerate(same if bootstrap else (), start=1):
            names = {"checkpoint": checkpoints[index]["name"], "baseline": checkpoints[base]["name"]}
            comparisons.append(names | bootstrap.compare(0, place)["accuracy"])
    return comparisons


def _worst(benchmark: Benchmark, name: str, questions: Sequence[VqaQuestion], scores: Scores, said: Texts) -> str:
    """A checkpoint's worst answers by the first of the types; those of the same score in the order of the file."""
    by_type: dict[str, list[VqaQuestion]] = defaultdict(list)
    for one in [one for one in questions if one.question_id in scores]:
        by_type[" ".join(map(str, next(iter(one.groups.items()), ("all",))))].append(one)
    head, text = ["question_id", "image", "question", "answer", "right", "score"], f"## {name}\n\n"
    for kind, own in sorted(by_type.items()):
        rows = []
        for one in sorted(own, key=lambda one: scores[one.question_id])[:WORST]:
            key, gold = one.question_id, one.record[benchmark.gold]
            if isinstance(gold, list):
                texts = Counter(answer["answer"] if isinstance(answer, Mapping) else answer for answer in gold)
                gold = ", ".join(f"{answer} ({count})" for answer, count in texts.most_common())
            elif "choices" in one.record:
                gold = one.record["choices"][gold]
            cells = [key, one.image, one.text, said.get(key, "(none)"), gold, f"{scores[key]:.2f}"]
            rows.append([" ".join(str(cell).splitlines()) for cell in cells])
        text += f"### {kind}\n\n{Table(head, rows).markdown()}\n"
    return text


# The table of all benchmarks


def markdown(folder: Path) -> str:
    """The content of `vqa.md`, from the JSON files of the folder."""
    found = [read_json(path) for name in BENCHMARKS if (path := folder / f"{name}.json").is_file()]
    found = [one for one in found if "accuracy" in one["checkpoints"][0]]
    rows: dict[str, dict[str, str]] = {}
    for one in found:
        for own in one["checkpoints"]:
            cell = f"{percent(own['accuracy'], own['interval'])}, n {one['questions']:,}"
            rows.setdefault(own["name"], {})[one["benchmark"]] = cell
    for name, (protocol, own) in PUBLISHED.items():
        rows[f"published: {name} ({protocol})"] = {key: f"{score:.1f}" for key, score in own.items()}
    head = ["accuracy, %", *(BENCHMARKS[one["benchmark"]].title for one in found)]
    cells = [[name, *(own.get(one["benchmark"], "-") for one in found)] for name, own in rows.items()]
    shown = [row for row in cells if set(row[1:]) != {"-"}]
    notes = [f"Intervals: 95%, {DRAWS:,} bootstrap draws of images with all their questions; n: questions."]
    notes += map(_note, found)
    return document("Visual question answering", Table(head, shown), notes, list(map(_section, found)))


def percent(score: float, interval: Sequence[float] | None = None) -> str:
    """`58.20`, or with its interval `58.20 (55.10 - 61.00)`."""
    return f"{100 * score:.2f}" + (f" ({100 * interval[0]:.2f} - {100 * interval[1]:.2f})" if interval else "")


def _note(one: Mapping[str, Any]) -> str:
    """How a column was measured."""
    setup, digests = one["setup"], one["sha256"].items()
    parts = [f"{BENCHMARKS[one['benchmark']].title}: scorer {one['scorer']} ({one['rule']})"]
    if setup:
        decoding = ", ".join(f"{key} {value}" for key, value in setup["decoding"].items())
        parts += [f"prompt {setup['prompt_name']} `{setup['prompt']}`", f"decoding: {decoding}"]
    files = ", ".join(f"{Path(file).name} {digest[:12]}" for file, digest in list(digests)[:3])
    parts += [f"answers {one['answer']}", f"split {one['split']} ({one['form']})", f"sha256 {files}"]
    parts += [f"PARTIAL: {one['questions']:,} {one['partial']}"] if one["partial"] else []
    return "; ".join(parts).replace("\n", "\\n") + "."


def _section(one: Mapping[str, Any]) -> str:
    """Shares, scores of the others, baselines, differences, and a table by each type."""
    checkpoints = one["checkpoints"]
    first, tables = checkpoints[0], []
    shares = [name for name in ("long", "empty", "neither") if name in first]
    plain = [name for name, value in first["figures"].items() if not isinstance(value, Mapping)]
    rows = [
        [own["name"], *map(percent, [*(own[name] for name in shares), *own["scores"].values()])] for own in checkpoints
    ]
    head = [f"more than {LONG} words" if name == "long" else name for name in shares]
    tables.append(Table(["%", *head, *first["scores"]], rows))
    if plain:
        tables.append(score_table({own["name"]: own["figures"] for own in checkpoints}, plain))
    if one["comparisons"]:
        pairs = [(own, f"{own['checkpoint']} - {own['baseline']}") for own in one["comparisons"]]
        rows = [[name, percent(own["difference"], own["interval"]), f"{own['p']:.3f}"] for own, name in pairs]
        tables.append(Table(["difference", "points", "p, paired"], rows))
    for name in first["groups"]:
        found = [own["groups"].get(name, {}) for own in checkpoints]
        counts = {value: count for own in found for value, (_, count) in own.items()}
        rows = [
            [value, f"{count:,}", *(percent(own[value][0]) if value in own else "-" for own in found)]
            for value, count in counts.items()
        ]
        tables.append(Table([name, "n", *(own["name"] for own in checkpoints)], rows))
    baselines = ", ".join(f"{name} {percent(score)}" for name, score in one["baselines"].items())
    parts = [f"## {BENCHMARKS[one['benchmark']].title}", baselines, *(table.markdown().strip() for table in tables)]
    return "\n\n".join(filter(None, parts))
