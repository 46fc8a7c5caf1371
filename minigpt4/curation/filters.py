"""The step `filter`: rules on a text, on an image, and on the set; each can be switched off.

Rules of one record look at all of them. Those of the set look at what the others leave, one after the other, so that a
bad twin never costs the good one; of a group the first by a hash of its id stays, whatever the order of the file.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rensa import RMinHash, RMinHashLSH

from minigpt4.common.curation_schema import FilterConfig
from minigpt4.common.errors import SampleError, errors_as
from minigpt4.common.utils import parse_json
from minigpt4.curation.images import HASH_BITS, describe, find
from minigpt4.curation.records import Record, dropped, ended_of, text_of
from minigpt4.curation.refine import content_words, is_foreign, other_language
from minigpt4.evaluation.failure_rules import REPETITION, SENTENCE, duplicates, find_failures, words_of

STEP = "filter"
ITSELF, SHORT, LONG, SIGNS, LANGUAGE = "talk about itself", "too short", "too long", "signs", "language"
POOR, SAME_IMAGE, ALIKE, SAME_TEXT, OPENING = "image poor", "image twice", "image alike", "text twice", "opening"
LEAKAGE, CAPTION, LIKELIHOOD = "in a test set", "caption", "likelihood"
OPENING_WORDS = 5
SHINGLE = 5
"""Words of a passage, of which texts that are alike share many."""
VARIED_WORDS = 5
PERMUTATIONS, BANDS = 256, 64
"""Of MinHash: texts with a Jaccard of 0.7 share a band with a probability above 0.9999; the exact number decides."""
NEAR = 0.8
"""Of a threshold: from there on a rule nearly hits."""
COMMON_SIGNS = frozenset(".,;:'\"!?()-’‘“”–—")
BLOCK = 1024


class Hit(NamedTuple):
    """A rule that speaks against a record."""

    rule: str
    evidence: str
    review: bool = False
    """People have to look at it; else it is dropped."""


# One record


def text_rules(
    text: str, ended: bool | None, settings: FilterConfig, count: Callable[[str], int]
) -> tuple[list[Hit], dict[str, Any]]:
    """What speaks against a text, and its measures. `count`: tokens of the LLM; `ended`: of `find_failures`."""
    hits, words = [], words_of(text)
    if settings.failures:
        hits += [Hit(one.kind, one.evidence) for one in find_failures(text, "prose", ended)]
    share, came_before = duplicates(words)
    signs = [one for one in text if not (one.isalnum() or one.isspace() or one in COMMON_SIGNS)]
    measures = {"words": len(words), "tokens": count(text), "ngram_share": round(share, 3)}
    measures["signs"] = round(len(signs) / max(1, len(text)), 3)
    plain = " ".join(text.replace("’", "'").lower().split())
    for phrase in settings.phrases:
        if re.search(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", plain):
            hits.append(Hit(ITSELF, f"says “{phrase}”"))
            break
    if settings.least_tokens is not None and measures["tokens"] < settings.least_tokens:
        hits.append(Hit(SHORT, f"{measures['tokens']} tokens"))
    if settings.most_tokens is not None and measures["tokens"] > settings.most_tokens:
        hits.append(Hit(LONG, f"{measures['tokens']} tokens"))
    varied, sentence = varied_sentences(text)
    if all(hit.rule != REPETITION for hit in hits):
        if _exceeds(share, settings.ngram_share):
            hits.append(Hit(REPETITION, came_before))
        elif settings.varied_sentences and varied >= settings.varied_sentences:
            hits.append(Hit(REPETITION, f"{varied} sentences like “{sentence}”"))
    if _exceeds(measures["signs"], settings.signs):
        hits.append(Hit(SIGNS, f"{measures['signs']:.0%} of the characters: {''.join(dict.fromkeys(signs))[:40]}"))
    if settings.language is not None and words:
        name, score = other_language(text)
        measures["other_language"] = score
        strange = next((one for one in SENTENCE.split(text) if is_foreign(one)), None)
        if _exceeds(score, settings.language):
            hits.append(Hit(LANGUAGE, f"{name} with a score of {score:.2f}"))
        elif strange is not None:
            hits.append(Hit(LANGUAGE, f"the sentence “{strange[:80]}”"))
    return hits, measures


def varied_sentences(text: str) -> tuple[int, str]:
    """How many sentences differ in one word alone, at the same place, and these with `...` for it; 0 without any."""
    found: Counter[str] = Counter()
    for words in {tuple(words_of(sentence)) for sentence in SENTENCE.split(text)}:
        if len(words) >= VARIED_WORDS:
            found.update(" ".join((*words[:n], "...", *words[n + 1 :])) for n in range(len(words)))
    return max(((times, sentence) for sentence, times in found.items()), default=(0, ""))


def _exceeds(value: float, most: float | None) -> bool:
    return most is not None and value > most


def image_rules(record: Mapping[str, Any], settings: FilterConfig) -> list[Hit]:
    """What speaks against an image by itself."""
    width, height, contrast = record["width"], record["height"], record.get("contrast")
    ratio = max(width, height) / min(width, height)
    least = settings.least_contrast
    faults = {
        f"{width} x {height} pixels": min(width, height) < (settings.least_side or 0),
        f"sides of {ratio:.1f} to 1": _exceeds(ratio, settings.most_ratio),
        f"one colour (contrast {contrast})": None not in (least, contrast) and contrast < least,
    }
    found = [text for text, is_fault in faults.items() if is_fault]
    return [Hit(POOR, "; ".join(found))] if found else []


def caption_rule(text: str, caption: str | None) -> list[Hit]:
    """A text that mentions nothing of the image's own caption."""
    wanted = set(content_words(caption or ""))
    if not wanted or wanted & set(content_words(text)):
        return []
    return [Hit(CAPTION, f"mentions nothing of “{caption}”", review=True)]


# The set


def order_of(record: Mapping[str, Any]) -> str:
    """Which of several stays: the first."""
    return hashlib.sha256(record["id"].encode()).hexdigest()


def near_pairs(one_NV: np.ndarray, other_MV: np.ndarray, least: float) -> Iterator[tuple[int, int, float]]:
    """Numbers and inner product of all pairs of rows with one of `least` or more."""
    for start in range(0, len(one_NV), BLOCK):
        products = one_NV[start : start + BLOCK] @ other_MV.T
        for row, column in zip(*np.nonzero(products >= least), strict=True):
            yield start + int(row), int(column), float(products[row, column])


def image_pairs(one: Sequence[str], other: Sequence[str], most: int) -> Iterator[tuple[int, int, int]]:
    """Numbers and distance, bits, of all pairs of pHashes, hexadecimal, that are at most `most` apart."""
    for row, column, product in near_pairs(_signs(one), _signs(other), HASH_BITS - 2 * most):
        yield row, column, int(HASH_BITS - product) // 2


def _signs(hashes: Sequence[str]) -> np.ndarray:
    numbers = np.array([int(text, 16) for text in hashes], dtype=">u8")
    bits = np.unpackbits(numbers.view(np.uint8).reshape(-1, 8), axis=1)
    return bits.astype(np.float32) * 2 - 1


def shingles(text: str) -> frozenset[str]:
    """The passages of a text that others are compared with."""
    words = words_of(text)
    return frozenset(" ".join(words[n : n + SHINGLE]) for n in range(max(1, len(words) - SHINGLE + 1)))


def text_pairs(texts: Sequence[str], least: float) -> Iterator[tuple[int, int, float]]:
    """Numbers and Jaccard of all pairs of texts from `least` on; MinHash proposes them."""
    own = [shingles(text) for text in texts]
    index, hashes = RMinHashLSH(threshold=least, num_perm=PERMUTATIONS, num_bands=BANDS), []
    for number, passages in enumerate(own):
        hashes.append(RMinHash(num_perm=PERMUTATIONS, seed=0))
        hashes[-1].update(sorted(passages))
        index.insert(number, hashes[-1])
    for number, one in enumerate(hashes):
        for other in sorted(index.query(one)):
            if other > number:
                jaccard = len(own[number] & own[other]) / len(own[number] | own[other])
                if jaccard >= least:
                    yield number, other, jaccard


def _one_stays(records: Sequence[Record], pairs: Iterable[tuple[int, int, Any]]) -> dict[int, tuple[int, Any]]:
    """Of each record that goes, the one that stays for it and how near they are: in order, each goes that is near one
    that stays."""
    near: dict[int, list[tuple[int, Any]]] = {}
    for one, other, how in pairs:
        if one != other:
            near.setdefault(one, []).append((other, how))
            near.setdefault(other, []).append((one, how))
    gone: dict[int, tuple[int, Any]] = {}
    stays: set[int] = set()
    for number in sorted(near, key=lambda number: order_of(records[number])):
        twin = next(((other, how) for other, how in near[number] if other in stays), None)
        if twin is None:
            stays.add(number)
        else:
            gone[number] = twin
    return gone


def same_images(records: Sequence[Record], settings: FilterConfig) -> dict[int, Hit]:
    """Images that are there already, and those that have to be looked at."""
    hashes, distance = [one["phash"] for one in records], settings.image_distance
    farthest = max(distance, settings.image_distance_review or 0)
    pairs = [(one, other, bits) for one, other, bits in image_pairs(hashes, hashes, farthest) if one < other]
    gone = _one_stays(records, [pair for pair in pairs if pair[2] <= distance])
    hits = {}
    for number, (twin, bits) in gone.items():
        same = records[number]["sha256"] == records[twin]["sha256"]
        hits[number] = Hit(SAME_IMAGE, f"{records[twin]['id']}: {'the same file' if same else f'{bits} bits apart'}")
    unsure = [pair for pair in pairs if pair[2] > distance and pair[0] not in gone and pair[1] not in gone]
    for number, (twin, bits) in _one_stays(records, unsure).items():
        hits[number] = Hit(SAME_IMAGE, f"{records[twin]['id']}: {bits} bits apart", review=True)
    return hits


def same_texts(records: Sequence[Record], least: float) -> dict[int, Hit]:
    """Texts that are there already."""
    gone = _one_stays(records, text_pairs([text_of(one) for one in records], least))
    return {n: Hit(SAME_TEXT, f"{records[twin]['id']}: Jaccard {how:.2f}") for n, (twin, how) in gone.items()}


def alike_images(records: Sequence[Record], features: Mapping[str, np.ndarray], least: float) -> dict[int, Hit]:
    """Images whose features, of length 1 by id, have a cosine from `least` on."""
    rows_NV = np.array([features[one["id"]] for one in records])
    gone = _one_stays(records, near_pairs(rows_NV, rows_NV, least))
    return {n: Hit(ALIKE, f"{records[twin]['id']}: cosine {how:.3f}") for n, (twin, how) in gone.items()}


def openings(records: Sequence[Record], most: float) -> dict[int, Hit]:
    """Texts beyond the share that may begin with the same words."""
    cap, counts, hits = max(1, int(most * len(records))), Counter(), {}
    for number in sorted(range(len(records)), key=lambda number: order_of(records[number])):
        first = " ".join(words_of(text_of(records[number]))[:OPENING_WORDS])
        counts[first] += 1
        if counts[first] > cap:
            hits[number] = Hit(OPENING, f"“{first}” begins {cap} others, {most:.1%} of the set")
    return hits


class HeldOut(NamedTuple):
    """What training data must not hold."""

    hashes: Mapping[str, str]
    """pHash by the name of the image."""
    texts: Mapping[str, str]

    @classmethod
    def read(cls, sources: Sequence[str]) -> "HeldOut":
        """Of folders and lists of images, and lists of captions; SampleError for one that is neither."""
        hashes, texts = {}, {}
        for source in sources:
            captions = None
            if Path(source).suffix == ".json":
                with errors_as(SampleError, f"curation.filter.test_sets: {source} cannot be read"):
                    content = parse_json(Path(source).read_bytes())
                captions = content.get("annotations") if isinstance(content, dict) else content
                captions = [one for one in captions or [] if isinstance(one, dict) and "caption" in one]
                texts |= {f"{source}: {one.get('image_id')} {n}": str(one["caption"]) for n, one in enumerate(captions)}
            if not captions or any("image" in one for one in captions):
                own = {f"{source}: {one.key}": describe(one.file) for one in find(source, None)}
                hashes |= {name: facts["phash"] for name, facts in own.items() if "phash" in facts}
        return cls(hashes, texts)

    def hits(self, records: Sequence[Record], settings: FilterConfig) -> dict[int, Hit]:
        """Records whose image or text is in a test set."""
        names, hits = list(self.hashes), {}
        if settings.image_distance is not None and names:
            found = image_pairs([one["phash"] for one in records], list(self.hashes.values()), settings.image_distance)
            hits |= {n: Hit(LEAKAGE, f"{names[other]}: {bits} bits apart") for n, other, bits in found}
        if settings.text_jaccard is not None and self.texts:
            names, count = list(self.texts), len(records)
            texts = [*(text_of(one) for one in records), *self.texts.values()]
            for one, other, jaccard in text_pairs(texts, settings.text_jaccard):
                if one < count <= other:
                    hits.setdefault(one, Hit(LEAKAGE, f"{names[other - count]}: Jaccard {jaccard:.2f}"))
        return hits


# The step


class Evidence(NamedTuple):
    """What rules need beside the records."""

    count: Callable[[str], int]
    """Tokens of the LLM."""
    held_out: HeldOut | None = None
    features: Mapping[str, np.ndarray] | None = None
    """Of images, by id; for `image_alike`."""
    gains: Mapping[str, float] | None = None
    """How much likelier the image makes a text, nats a token, by id; for `likelihood`."""


def filter_records(records: Sequence[Record], settings: FilterConfig, evidence: Evidence) -> list[Record]:
    """Records with `kept`, `failed_rules`, `near_rules`, `measures`, and `dropped` or `review` where rules hit."""
    hits: dict[int, list[Hit]] = {}
    measures: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(records):
        if "dropped" in record:
            continue
        text = text_of(record)
        ended = None if record.get("refiner", "none") != "none" else ended_of(record)
        own, measures[number] = text_rules(text, ended, settings, evidence.count)
        own += image_rules(record, settings)
        own += caption_rule(text, record.get("caption")) if settings.caption else []
        hits[number] = own
    of_set = (
        (evidence.held_out, lambda own: evidence.held_out.hits(own, settings)),
        (settings.image_distance is not None, lambda own: same_images(own, settings)),
        (settings.image_alike is not None, lambda own: alike_images(own, evidence.features, settings.image_alike)),
        (settings.text_jaccard is not None, lambda own: same_texts(own, settings.text_jaccard)),
        (settings.opening is not None, lambda own: openings(own, settings.opening)),
        (settings.likelihood is not None, lambda own: unlikely(own, evidence.gains, settings.likelihood)),
    )
    for is_on, rule in of_set:
        if is_on:
            left = [number for number in hits if all(hit.review for hit in hits[number])]
            for place, hit in rule([records[number] for number in left]).items():
                hits[left[place]].append(hit)
    for number, own in measures.items():
        if records[number]["id"] in (evidence.gains or {}):
            own["image_gain"] = round(evidence.gains[records[number]["id"]], 4)
    return [
        record if "dropped" in record else _judged(record, hits[number], measures[number], settings)
        for number, record in enumerate(records)
    ]


def unlikely(records: Sequence[Record], gains: Mapping[str, float], share: float) -> dict[int, Hit]:
    """Texts that do not depend on the image: those it makes less likely, and the lowest `share`."""
    known = sorted((gains[one["id"]], n) for n, one in enumerate(records) if one["id"] in gains)
    lowest = {n for _, n in known[: int(share * len(known))]}
    text = "the image makes it likelier by {:.3f} nats a token"
    return {n: Hit(LIKELIHOOD, text.format(gain), review=True) for gain, n in known if gain < 0 or n in lowest}


def _judged(record: Record, hits: Sequence[Hit], measures: dict[str, Any], settings: FilterConfig) -> Record:
    against = [hit for hit in hits if not hit.review]
    looked_at = record.get("review", []) + [dropped(STEP, hit.rule, hit.evidence) for hit in hits if hit.review]
    fields: Record = {"kept": not against, "failed_rules": [hit.rule for hit in against]}
    fields |= {"near_rules": near(measures, settings), "measures": measures}
    fields |= {"review": looked_at} if looked_at else {}
    if against:
        fields["dropped"] = dropped(STEP, against[0].rule, against[0].evidence)
        fields["evidence"] = {hit.rule: hit.evidence for hit in against}
    return record | fields


def near(measures: Mapping[str, Any], settings: FilterConfig) -> list[str]:
    """Rules that a text nearly fell to."""
    tokens, least = measures["tokens"], settings.least_tokens
    upper = {
        REPETITION: (measures["ngram_share"], settings.ngram_share),
        SIGNS: (measures["signs"], settings.signs),
        LANGUAGE: (measures.get("other_language", 0.0), settings.language),
        LONG: (tokens, settings.most_tokens),
    }
    found = [rule for rule, (value, most) in upper.items() if most and NEAR * most <= value <= most]
    return found + ([SHORT] if least is not None and least <= tokens < least / NEAR else [])
