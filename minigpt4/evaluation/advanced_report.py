"""The report of judged tasks: the table, how sure it is, how good the judges are, and a page with every answer.

No file holds a time: the same answers and verdicts write the same bytes.
"""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import write_json, write_whole
from minigpt4.evaluation.advanced import ALL, RULES, SHUFFLED, TASKS, AnswerSet, TaskAnswer, control, shuffled, to_judge
from minigpt4.evaluation.bootstrap import agreement, mcnemar, wilson
from minigpt4.evaluation.questions import read_json
from minigpt4.evaluation.report import (
    Table,
    decoding_line,
    document,
    filled,
    four_digits,
    html_parts,
    page,
    thumbnail,
    under_headings,
)

PUBLISHED = {"BLIP-2": (0, 4, 1, 0), "MiniGPT-4": (8, 18, 19, 20)}
"""Passed of 25 each, by task."""
PUBLISHED_COVERAGE = [
    ["published: BLIP-2", "1.96", "0.275", "6.5", "0.013"],
    ["published: MiniGPT-4", "2.22", "0.662", "175", "0.096"],
    ["published: MiniGPT-4, GPT-4V's data in stage 2", "2.26", "-", "-", "-"],
]
"""Tables 2 and 6; 66.2% and 27.5% in earlier versions of the paper."""
MOST_SHUFFLED = 0.25
"""A judge that passes more answers beside wrong images, as a share of the good ones that it passes, is useless."""
PICTURE = 640
"""Longer side on the pages, pixels."""
TEMPLATE = Path(__file__).with_name("advanced_page.html")
MARKDOWN, JSON, PAGE, BLIND_PAGE = "advanced.md", "advanced.json", "advanced.html", "judge.html"

Judges = Sequence[Mapping[str, Any]]
"""As `read_verdicts` gives them."""
Passes = Callable[[TaskAnswer], bool | None]
"""Whether an answer passes; None for no verdict, or as many for it as against it."""


# Numbers


def evaluate(sets: Sequence[AnswerSet], judges: Judges) -> dict[str, Any]:
    """The content of `advanced.json`; SampleError where no verdict is about these answers."""
    passes = _majority(judges)
    tasks = list(dict.fromkeys(one.task for one in sets[0].answers))
    rows, moved = [], []
    for own in sets:
        cut_off = sum(one.ended is False for one in own.answers)
        row = {"name": own.model, "tasks": _shares(own.answers, tasks, passes), "cut_off": cut_off}
        rows.append(row | {"checkpoint": own.checkpoint, "setup": own.setup})
        row = {"name": f"{own.model}, {SHUFFLED}", "tasks": _shares(shuffled(own.answers), tasks, passes)}
        moved += [row] if row["tasks"][ALL]["judged"] else []
    if not any(row["tasks"][ALL]["judged"] for row in rows):
        raise SampleError("none of the verdicts are about these answers, which have changed since; judge them again")
    everything = to_judge([one for own in sets for one in own.answers], seed=0)
    given = [[_pass(judge, key) for judge in judges] for key in everything]
    about = []
    for judge in judges:
        own = [judge["verdicts"][key] for key in everything if key in judge["verdicts"]]
        counts = {"given": len(own) - own.count(None), "none": own.count(None), "control": _control(judge)}
        about.append({key: value for key, value in judge.items() if key != "verdicts"} | counts)
    return {
        "questions": len(sets[0].answers),
        "answers": len(everything),
        "tasks": tasks,
        "rows": rows,
        "shuffled": moved,
        "pairs": [_compare(*pair, tasks, passes) for pair in combinations(sets, 2)],
        "undecided": sum(passes(one) is None for one in everything.values()),
        "judges": about,
        "agreement": agreement(given) if len(judges) > 1 else None,
    }


def _pass(judge: Mapping[str, Any], key: str) -> bool | None:
    return (judge["verdicts"].get(key) or {}).get("pass")


def _majority(judges: Judges) -> Passes:
    def passes(answer: TaskAnswer) -> bool | None:
        own = [one for judge in judges if (one := _pass(judge, answer.key)) is not None]
        return None if sum(own) * 2 == len(own) else sum(own) * 2 > len(own)

    return passes


def _shares(answers: Iterable[TaskAnswer], tasks: Sequence[str], passes: Passes) -> dict[str, dict[str, Any]]:
    """Passed and judged answers by task and of all, with their interval."""
    found = [(one.task, said) for one in answers if (said := passes(one)) is not None]
    shares = {}
    for task in (*tasks, ALL):
        own = [said for name, said in found if task in (name, ALL)]
        ends = wilson(sum(own), len(own)) if own else None
        shares[task] = {"passed": sum(own), "judged": len(own), "interval": ends}
    return shares


def _compare(first: AnswerSet, second: AnswerSet, tasks: Sequence[str], passes: Passes) -> dict[str, Any]:
    """The questions that one of two models alone passes, by task and of all, and McNemar's p."""
    other = {one.question_id: passes(one) for one in second.answers}
    both = [(one.task, passes(one), other[one.question_id]) for one in first.answers]
    compared = {}
    for task in (*tasks, ALL):
        own = [(ours, theirs) for name, ours, theirs in both if task in (name, ALL)]
        only = [own.count((True, False)), own.count((False, True))]
        compared[task] = {"first_only": only[0], "second_only": only[1], "p": mcnemar(*only)}
    return {"first": first.model, "second": second.model, "tasks": compared}


def _control(judge: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many answers of known quality a judge passes, by kind; None where it saw none."""
    kinds = {name: _shares(answers, [], _majority([judge]))[ALL] for name, answers in control().items()}
    if not kinds[SHUFFLED]["judged"]:
        return None
    good, wrong = kinds["good"]["passed"], kinds[SHUFFLED]["passed"]
    return {"kinds": kinds, "useless": good == 0 or wrong > MOST_SHUFFLED * good}


# Words and tables


def headline(results: Mapping[str, Any]) -> str:
    """What was judged, and whether that is worth anything."""
    useless = [one["judge"] for one in results["judges"] if one["control"] and one["control"]["useless"]]
    warning = f"; USELESS JUDGE: {', '.join(useless)}" if useless else ""
    return f"Advanced tasks: {results['questions']} questions, own images, own judge{warning}"


def tables_of(results: Mapping[str, Any]) -> dict[str, Table]:
    """By heading; the main one, a row a model and a column a task, first."""
    tasks, kinds = [*results["tasks"], ALL], [*control()]
    rows = [[row["name"], *map(_share, row["tasks"].values())] for row in (*results["rows"], *results["shuffled"])]
    checks, pairs, published = [], [], []
    for name, own in [(one["judge"], one["control"]) for one in results["judges"] if one["control"]]:
        shares = [_share(own["kinds"][kind]) for kind in kinds]
        checks.append([name, *shares, "USELESS" if own["useless"] else "of use"])
    for pair in results["pairs"]:
        cells = [f"{own['first_only']} : {own['second_only']}, p {own['p']:.3f}" for own in pair["tasks"].values()]
        pairs.append([f"{pair['first']} : {pair['second']}", *cells])
    for name, passed in PUBLISHED.items() if set(TASKS) & set(tasks) else ():
        counts = [*((count, 25) for count in passed), (sum(passed), 100)]
        shares = [{"passed": count, "judged": of, "interval": wilson(count, of)} for count, of in counts]
        published.append([name, *map(_share, shares)])
    tables = {
        "Passed": Table(["model", *tasks], rows),
        "Judge control: answers of known quality that pass": Table(["judge", *kinds, "the judge is"], checks),
        "Passed by one alone, and p of McNemar's exact test": Table(["models", *tasks], pairs),
        "Published: other images, people as judges": Table(["model", *TASKS, ALL], published),
    }
    return {heading: table for heading, table in tables.items() if table.rows}


def _share(own: Mapping[str, Any]) -> str:
    if not own["judged"]:
        return "-"
    low, high = own["interval"]
    return f"{own['passed']} of {own['judged']} ({low:.0%} - {high:.0%})"


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader has to know about the numbers."""
    lines = ["Passed of the answers judged, by the majority of the judges; in brackets the 95% Wilson interval."]
    for one in results["judges"]:
        how = f", {one['url']}, prompt {one.get('prompt_sha256')}" if "url" in one else ""
        counts = f"{one['given']} verdicts on {results['answers']} different answers, {one['none']} replies were none"
        lines.append(f"Judge {one['judge']} ({one['kind']}{how}): {counts}.")
        if one["control"] and one["control"]["useless"]:
            lines.append(f"{one['judge']} is USELESS: it does not tell good answers from those to other images.")
    if results["undecided"]:
        lines.append(f"{results['undecided']} answers have no verdict, or as many for as against; they are left out.")
    if own := results["agreement"]:
        value = four_digits(own["value"], own["interval"])
        lines.append(
            f"{own['measure']}, {own['judged']} answers judged by several: {value}; {own['same']:.0%} the same."
        )
    cut_off = [f"{row['name']} {row['cut_off']} of {results['questions']}" for row in results["rows"]]
    lines.append(f"Cut off by the token limit: {', '.join(cut_off)}.")
    decodings = {row["name"]: decoding_line(row["setup"]) for row in results["rows"] if row["setup"]}
    same = len(set(decodings.values())) == 1
    lines += [*decodings.values()][:1] if same else [f"{name}: {line}" for name, line in decodings.items()]
    return lines


def joined_tables(files: Sequence[Path]) -> dict[str, Table]:
    """Tables of the results of other commands: failure rates, and coverage beside CHAIR of the same captions.

    SampleError for a file that is neither `failures.json` nor an `--output` of `eval_coverage.py` or of
    `eval_hallucination.py chair`.
    """
    tables, captions = {}, {}
    for file in files:
        own = read_json(file)
        own = own if isinstance(own, dict) else {}
        row = captions.setdefault(str(own["results"]), {}) if "results" in own else {}
        if "failures" in own and "checkpoints" in own:
            from minigpt4.evaluation.failure_rate import headline, rate_table  # loads torch

            tables[f"{headline(own)} ({file})"] = rate_table(own)
        elif "protocol" in own and "results" in own:
            row |= {own["protocol"]: four_digits(own["score"], own["interval"])}
            row |= {"words": f"{own['mean_words']:.1f}"} if "mean_words" in own else {}
        elif "CHAIR-i" in own.get("scores", ()) and "results" in own:
            row |= {"CHAIR-i": four_digits(own["scores"]["CHAIR-i"]), "words": f"{own['scores']['words']:.1f}"}
        else:
            raise SampleError(f"--join: {file} is not a result of eval_failure_rate, eval_coverage or CHAIR")
    if captions:
        columns = ("captions", "objects", "words", "CHAIR-i")
        rows = [[name, *(own.get(column, "-") for column in columns)] for name, own in captions.items()]
        head = ["descriptions", "captions covered, of 5", "one caption covered", "words", "CHAIR-i"]
        tables["Coverage"] = Table(head, [*rows, *PUBLISHED_COVERAGE])
    return tables


# Files


def write_report(folder: Path, sets: Sequence[AnswerSet], judges: Judges, joined: Mapping[str, Table]) -> str:
    """Write table, numbers and page; what the terminal shows. Errors as of `evaluate`."""
    results, passes = evaluate(sets, judges), _majority(judges)
    tables, remarks, shown = tables_of(results) | joined, notes(results), []
    (_, first), *more = tables.items()
    text = document(headline(results), first, remarks, under_headings(dict(more)))
    write_whole(folder / MARKDOWN, text)
    write_json(folder / JSON, results, "--save_path")
    for one, model in [(one, own.model) for own in sets for one in own.answers]:
        said = [(judge["judge"], judge["verdicts"].get(one.key)) for judge in judges]
        verdicts = [{"judge": name, **verdict} for name, verdict in said if verdict]
        shown.append(_card(one) | {"model": model, "pass": passes(one), "verdicts": verdicts})
    shown.sort(key=lambda card: results["tasks"].index(card["task"]))
    head = "".join(html_parts(tables, remarks))
    _write_page(folder / PAGE, headline(results), head, shown, [one for own in sets for one in own.answers])
    return text


def write_blind_page(folder: Path, sets: Sequence[AnswerSet], seed: int) -> Path:
    """A page on which a person judges the answers, in an order and under keys that hide who wrote them.

    SampleError where an image is gone.
    """
    chosen = to_judge([one for own in sets for one in own.answers], seed)
    if gone := [one.image for one in chosen.values() if not Path(one.image).is_file()]:
        raise SampleError(f"{gone[0]}: the image is gone; run `answer` again with --images where it is now")
    cards = [_card(one) | {"key": key} for key, one in chosen.items()]
    file = folder / BLIND_PAGE
    _write_page(file, "Do these answers pass?", f"<p>{html.escape(RULES)}</p>", cards, chosen.values())
    return file


def _card(one: TaskAnswer) -> dict[str, Any]:
    own = {"id": one.question_id, "task": one.task, "picture": one.image_hash, "question": one.question}
    return own | {"criterion": one.criterion, "text": one.text, "cut_off": one.ended is False}


def _write_page(file: Path, title: str, head: str, cards: Sequence[Any], answers: Iterable[TaskAnswer]) -> None:
    images = {one.image_hash: Path(one.image) for one in answers}
    data = {"cards": cards, "pictures": {key: thumbnail(image, PICTURE) for key, image in images.items()}}
    write_whole(file, page(title, filled(TEMPLATE, {"HEAD": head}), data))
