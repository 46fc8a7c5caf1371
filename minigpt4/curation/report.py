"""What a curation did, on one page and in one JSON: where records left, what refining changed, what was asked and paid.

The files of the folder say it all, so the report can be written after each step, and again.
"""

import hashlib
import html
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.utils import as_json, read_facts, write_json, write_whole
from minigpt4.curation.export import FOLDER, PAPER
from minigpt4.curation.filters import ALIKE, LEAKAGE, OPENING_WORDS, SAME_IMAGE, SAME_TEXT
from minigpt4.curation.records import OPTION, CurationFolder, Record, dropped, ended_of, text_of
from minigpt4.curation.refine import content_words
from minigpt4.curation.review import Review, VerdictFile
from minigpt4.evaluation.failure_rules import NGRAM, find_failures, words_of
from minigpt4.evaluation.report import Table, page, thumbnail

STEPS = ("select", "generate", "refine", "filter")
EXAMPLES, SHOWN, GROUPS, COMMONEST = 10, 20, 20, 20
BINS = (0, 20, 40, 60, 80, 100, 120, 160, 240)
"""Words, for histograms; the last is open."""
RULE_COLUMNS = ("step", "hit", "alone", "review")
USUAL_LOSS = (0.1, 0.6)
STYLE = """<style>
 th, td { text-align: left; white-space: normal; }
 th:empty { padding: 0; border: 0; }
 summary { cursor: pointer; margin: .3rem 0; }
</style>
"""


class Curation:
    """The records of the last step that is done, and what became of them."""

    def __init__(self, folder: CurationFolder) -> None:
        self.folder = folder
        self.done = [step for step in STEPS if folder.file(step).is_file()]
        self.records = folder.read(self.done[-1] if self.done else "select")

    def after(self, step: str) -> list[Record]:
        """The records that a step left in."""
        later = STEPS[STEPS.index(step) + 1 :]
        return [one for one in self.records if "dropped" not in one or one["dropped"]["step"] in later]


def write_report(folder: CurationFolder, totals: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `report.html` and `report.json`, whose content is returned; `totals` of `Account.totals`."""
    own = Curation(folder)
    texts = {"generated": [(one["text"], ended_of(one)) for one in own.records if "text" in one]}
    refined = [one for one in own.after("refine") if "refined" in one]
    texts["refined"] = [(one["refined"], None) for one in refined]
    texts["kept"] = [(text_of(one), None) for one in own.records if one.get("kept")]
    texts = {name: pairs for name, pairs in texts.items() if pairs}
    generated = [one["tokens_first"] + one.get("tokens_second", 0) for one in own.records if "tokens_first" in one]
    tokens = {"generated": generated, "refined": [m["tokens"] for one in own.records if (m := one.get("measures"))]}
    rules, verdicts = rule_counts(own.records), VerdictFile(folder.file("review"))
    piled = sum("dropped" not in one and "review" in one for one in own.records)
    left = len(own.after(own.done[-1])) if own.done else 0
    results = {
        "funnel": [{"step": step, **_funnel(own, step)} for step in own.done],
        "paper": PAPER,
        "rules": rules,
        "warnings": _warnings(own, left),
        "second_turns": sum("second" in one for one in own.records),
        "lengths": {name: lengths([text for text, _ in pairs]) for name, pairs in texts.items()},
        "tokens": {name: round(float(np.mean(counts)), 1) for name, counts in tokens.items() if counts},
        "failure_rate": {name: failure_rate(pairs) for name, pairs in texts.items()},
        "refining": refining(refined) if refined else None,
        "openings": {name: openings([text for text, _ in pairs]) for name, pairs in texts.items()},
        "passages": {name: passages([text for text, _ in pairs]) for name, pairs in texts.items()},
        "duplicates": {rule: rules[rule]["hit"] for rule in (SAME_IMAGE, ALIKE, SAME_TEXT) if rule in rules},
        "leakage": rules.get(LEAKAGE, {}).get("hit", 0),
        "review": {"pile": piled}
        | (Review(own.records, verdicts).summary() if folder.file("review").is_file() else {}),
        "requests": totals,
        "truth": truth(own),
        "exported": read_facts(folder.path / FOLDER / "curation.json") or None,
        "made_from": {step: folder.made_from(step) for step in own.done},
    }
    write_json(folder.path / "report.json", results, OPTION)
    parts = [STYLE, *(f"<p><b>{html.escape(text)}</b></p>\n" for text in results["warnings"])]
    parts += [f"<h2>{heading}</h2>\n{body}\n" for heading, body in _sections(own, results)]
    write_whole(folder.path / "report.html", page("Curation", "".join(parts)), OPTION)
    return results


def _funnel(own: Curation, step: str) -> dict[str, Any]:
    place = STEPS.index(step)
    entered = len(own.records) if place == 0 else len(own.after(STEPS[place - 1]))
    left = [one for one in own.records if one.get("dropped", {}).get("step") == step]
    return {"entered": entered, "left": len(left), "rules": dict(Counter(one["dropped"]["rule"] for one in left))}


def rule_counts(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Of each rule its step, how many records it hit, how many it alone hit, how many of the hits are to be reviewed,
    and ten examples, in the order of the file."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        hits = {one["rule"]: {**one, "review": True} for one in record.get("review", [])}
        hits |= {rule: dropped("filter", rule, text) for rule, text in record.get("evidence", {}).items()}
        if (why := record.get("dropped")) and why["rule"] not in record.get("evidence", {}):
            hits[why["rule"]] = why
        for rule, hit in hits.items():
            own = found.setdefault(rule, {"step": hit["step"], "hit": 0, "alone": 0, "review": 0, "examples": []})
            own["hit"] += 1
            own["alone"] += len(hits) == 1
            own["review"] += "review" in hit
            if len(own["examples"]) < EXAMPLES:
                own["examples"].append({"id": record["id"], "evidence": hit["evidence"], "text": text_of(record)})
    return dict(sorted(found.items(), key=lambda pair: -pair[1]["hit"]))


def _warnings(own: Curation, left: int) -> list[str]:
    share = 1 - left / max(1, len(own.records))
    if "filter" in own.done and not USUAL_LOSS[0] <= share <= USUAL_LOSS[1]:
        usual = "from {:.0%} to {:.0%} is usual".format(*USUAL_LOSS)
        return [f"{share:.0%} of the records left; {usual}, and the paper's 30% is no target: check the rules"]
    return []


def lengths(texts: Sequence[str]) -> dict[str, Any]:
    """Words: mean, quantiles, and how many texts have from so many on."""
    words = np.array([len(text.split()) for text in texts])
    low, middle, high = np.percentile(words, [5, 50, 95]).round(1).tolist()
    histogram = np.histogram(words, bins=[*BINS, 10**9])[0].tolist()
    own = {"texts": len(texts), "mean": round(float(words.mean()), 1), "p5": low, "median": middle, "p95": high}
    return own | {"histogram": dict(zip(map(str, BINS), histogram, strict=True))}


def failure_rate(pairs: Sequence[tuple[str, bool | None]]) -> dict[str, Any]:
    """Share of texts that fail by docs/failure_rate.md, and how many by each kind."""
    found = [{failure.kind for failure in find_failures(text, "prose", ended)} for text, ended in pairs]
    return {
        "rate": round(sum(map(bool, found)) / len(found), 4),
        "kinds": dict(Counter(k for own in found for k in own)),
    }


def refining(refined: Sequence[Record]) -> dict[str, Any]:
    """Share of texts that did not change, mean similarity, share of new content words."""
    new = total = 0
    for one in refined:
        own = content_words(one["refined"]) if one["changed"] else []
        known = set(content_words(one["text"])) if own else set()
        new, total = new + sum(word not in known for word in own), total + len(own)
    return {
        "texts": len(refined),
        "unchanged": sum(not one["changed"] for one in refined) / len(refined),
        "similarity": round(sum(one["similarity"] for one in refined) / len(refined), 4),
        "new_words": round(new / max(1, total), 4),
    }


def openings(texts: Sequence[str]) -> list[tuple[str, int]]:
    """The commonest first words."""
    return Counter(" ".join(words_of(text)[:OPENING_WORDS]) for text in texts).most_common(COMMONEST)


def passages(texts: Sequence[str]) -> list[tuple[str, int]]:
    """The passages of NGRAM words that most texts have."""
    counts: Counter[str] = Counter()
    for text in texts:
        words = words_of(text)
        counts.update({" ".join(words[n : n + NGRAM]) for n in range(len(words) - NGRAM + 1)})
    return counts.most_common(COMMONEST)


def truth(own: Curation) -> dict[str, Any] | None:
    """In the mini world, where captions name everything that is there: `precision`, the share of the things named in a
    text that are there, and `recall`, of those that are there the share that is named; before and after refining."""
    images = (own.folder.made_from("select") or {}).get("images", "")
    if not any((folder / "world.json").is_file() for folder in Path(images.split("{")[0]).parents):
        return None
    from minigpt4.mini.report import named_things

    found: dict[str, Any] = {}
    for name, key, step in (("generated", "text", "generate"), ("refined", "refined", "refine")):
        known = [one for one in own.after(step) if one.get("caption") and key in one]
        named = [(named_things(one["caption"]), named_things(one[key])) for one in known]
        right = sum(len(there & said) for there, said in named)
        there, said = (sum(len(pair[side]) for pair in named) for side in (0, 1))
        found[name] = {"precision": right / max(1, said), "recall": right / max(1, there)}
    return found


# The page


def _sections(own: Curation, results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rows = [[one["step"], one["entered"], one["left"], _plain(one["rules"])] for one in results["funnel"]]
    paper = f"<small>The paper: {PAPER['images']:,} images, about {PAPER['kept']:,} kept.</small>"
    yield "Where records left", _table(["step", "entered", "left", "by rule"], rows) + paper
    rows = [[rule, *(one[key] for key in RULE_COLUMNS)] for rule, one in results["rules"].items()]
    keys = ("id", "evidence", "text")
    shown = {rule: [[own[key] for key in keys] for own in one["examples"]] for rule, one in results["rules"].items()}
    examples = "".join(_details(f"examples: {rule}", _table(keys, own)) for rule, own in shown.items())
    yield "Rules", _table(["rule", *RULE_COLUMNS], rows) + examples
    rows, columns = [], ("texts", "mean", "p5", "median", "p95")
    for name, one in results["lengths"].items():
        failures = results["failure_rate"][name]
        spread = [f"{from_}+: {count}" for from_, count in one["histogram"].items() if count]
        said = [f"{failures['rate']:.1%}", _plain(failures["kinds"]), ", ".join(spread)]
        rows.append([name, *(one[key] for key in columns), results["tokens"].get(name) or "", *said])
    head = ["", "texts", "words", "5%", "median", "95%", "tokens", "fail", "how", "texts by words"]
    yield "Texts", _table(head, rows)
    for key in ("refining", "truth", "review", "requests"):
        if results[key]:
            rows = [[name.replace("_", " "), _plain(value)] for name, value in results[key].items()]
            yield key.capitalize(), _table(["", ""], rows)
    commonest = [(key, name, pairs) for key in ("openings", "passages") for name, pairs in results[key].items()]
    yield "What texts share", "".join(_details(f"{k}, {n}", _table([k, "texts"], pairs)) for k, n, pairs in commonest)
    if groups := "".join(_groups(own)):
        yield "Images that are alike", groups
    refined = [one for one in own.records if "refined" in one]
    drawn = sorted(refined, key=lambda one: hashlib.sha256(f"shown {one['id']}".encode()).hexdigest())[:SHOWN]
    changed = sorted((one for one in refined if one["changed"]), key=lambda one: one["similarity"])[:SHOWN]
    for heading, records in (("Drawn at random", drawn), ("Changed most", changed)):
        yield heading, "".join(_whole(own, one) for one in records)
    card = {key: value for key, value in (results["exported"] or {}).items() if key != "made_from"}
    for name, content in (("made from", results["made_from"]), ("data card", card)):
        yield name.capitalize(), _details("as JSON", f"<pre>{html.escape(as_json(content))}</pre>")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return Table(head, [[str(cell) for cell in row] for row in rows]).html()


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _groups(own: Curation) -> Iterator[str]:
    """Images that fell to a twin, beside it."""
    by_id = {one["id"]: one for one in own.records}
    evidence = ((one, (one.get("evidence") or {}).get(rule)) for one in own.records for rule in (SAME_IMAGE, ALIKE))
    pairs = ((one, by_id.get(text.split(":")[0]), text) for one, text in evidence if text)
    for one, twin, text in islice(((a, b, text) for a, b, text in pairs if b), GROUPS):
        pictures = "".join(_picture(own, record) for record in (twin, one))
        yield f"<p>{pictures}<br>{html.escape(one['id'])} is like {html.escape(text)}</p>"


def _picture(own: Curation, record: Record) -> str:
    return f'<img src="{thumbnail(own.folder.image(record))}" alt="{html.escape(record["id"])}"> '


def _whole(own: Curation, record: Record) -> str:
    texts = [("generated", record["text"]), ("refined", record["refined"])][: 2 if record["changed"] else 1]
    lines = "".join(f"<p><small>{name}</small> {html.escape(text)}</p>" for name, text in texts)
    gone = record.get("dropped")
    state = f"{gone['step']}: {gone['rule']}, {gone['evidence']}" if gone else "kept"
    head = f"<p><b>{html.escape(record['id'])}</b> {html.escape(state)}</p>"
    return f"<article><div>{_picture(own, record)}</div><div>{head}{lines}</div></article>"
