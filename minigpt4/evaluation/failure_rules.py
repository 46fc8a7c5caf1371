"""When an answer is a failure: rules on its text, and on whether the model ended it.

`docs/failure_rate.md` has the rules in plain words, and how they agree with labelled texts.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

EMPTY, CUT_OFF, REPETITION, FRAGMENT, NOT_ENGLISH = "empty", "cut off", "repetition", "fragment", "not English"
OFF_IMAGE, OFF_INSTRUCTION = "off the image", "off the instruction"
RULED_KINDS = (EMPTY, CUT_OFF, REPETITION, FRAGMENT, NOT_ENGLISH)
"""What rules can find."""
JUDGED_KINDS = (OFF_IMAGE, OFF_INSTRUCTION)
"""What needs somebody who sees the image."""
KINDS = RULED_KINDS + JUDGED_KINDS

Form = Literal["prose", "verse"]
"""What the instruction asks for; verse may say things again that prose may not."""

MAX_PERIOD = 40
"""Words; longest passage that is looked for back to back with itself, about four lines of a poem."""
LOOPS = {"prose": {1: 4, 2: 3, 8: 2}, "verse": {1: 6, 2: 5, 24: 3}}
"""From which length of a passage, words, how many times in a row make a loop. People write "a very, very old tree";
nobody writes four. A refrain may be sung four times in a row, a line twice; loops of models go on for dozens."""
SENTENCE_WORDS = 4
"""Shorter sentences, such as "It is red.", may come again by chance."""
NGRAM = 4
DUPLICATE_SHARE = {"prose": 0.3, "verse": 0.6}
"""Share of n-grams that came before. Descriptions by people stay below 0.1, mechanical ones of the same few phrases
above 0.3; a villanelle has 0.35, and a pantoum, where every line comes twice, 0.5."""
DUPLICATE_NGRAMS = 12
"""Fewer n-grams have no meaningful share."""
LEAST_WORDS = {"prose": 12, "verse": 8}
"""An image in detail takes more than a caption, which has ten words on average; the shortest poem is a haiku."""
FOREIGN_SHARE = 0.1
"""Share of letters outside the Latin alphabet: more than a name or a sign that the answer reads out."""
FUNCTION_SHARE = {"prose": 0.2, "verse": 0.12}
"""Share of English function words: 0.35 to 0.55 in English prose, above 0.2 in nearly all verse, and below 0.1 in
other languages, which share a few short words with English."""
FUNCTION_SHARE_WORDS = 8
"""Fewer words have no meaningful share."""


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTION_WORDS = _word_set(
    """a an the this that these those and or but nor so yet if as than of in on at by for with from to into onto upon
    over under above below between behind beside near through across along around is are was were be been being am has
    have had do does did can could will would may might must shall should not no he she it its they them their his her
    him we us our you your i me my who whom whose which what where when while there here all both each every some any
    one two three other another more most very also only just up down out off about against before after like"""
)
OPEN_ENDS = _word_set(
    """a an the and or but nor of with by from into onto upon between beside than whose his her its their my your our
    is are was were am be as if because although while"""
)
"""Words that no English sentence ends with, and hardly a line of verse that ends a poem."""
OPEN_STARTS = _word_set("and or but of which who whose that than because although with")

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+")
SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]*_]*$")
DEBRIS = re.compile(
    r"#{2,}|<(?:/?Img|ImageHere|/?s|unk|pad)>|<\|\w+\|>|\b(?:Human|Assistant)\s*:|\[/?INST\]|�", re.IGNORECASE
)
"""Pieces of chat templates and broken characters."""
BARE_BULLET = re.compile(r"^\s*(?:[-*•+]|\(?\d{1,2}[.)])\s*$", re.MULTILINE)
QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|「[^」\n]*」")


class Task(NamedTuple):
    """What is asked for; its name is that on the command line and in `run.failure_prompts`."""

    title: str
    """Of its column."""

    form: Form
    """Of a good answer."""


TASKS = {"detail": Task("detailed description", "prose"), "poem": Task("poem", "verse")}


@dataclass(frozen=True)
class Failure:
    """One way in which an answer fails."""

    kind: str
    evidence: str
    """What shows it, for people."""


def find_failures(text: str, form: Form, ended: bool | None) -> list[Failure]:
    """The failures of an answer, at most one of a kind, in the order of `RULED_KINDS`.

    `ended`: True: the model ended the answer itself; False: the token limit did; None: not known.
    """
    words = words_of(text)
    if not words:
        return [Failure(EMPTY, "no word" + (f", only {text.strip()[:40]!r}" if text.strip() else ""))]
    again = _sentence_again(text) if form == "prose" else None
    share, came_before = duplicates(words)
    repetition = _loop(words, form) or again or (came_before if share >= DUPLICATE_SHARE[form] else None)
    letters = _other_letters(text)
    how = "after a whole sentence" if SENTENCE_END.search(text.rstrip()) else "in mid-sentence"
    limit = f"the token limit came before the end symbol, {how}: {_tail(text)}"
    found = {
        CUT_OFF: limit if ended is False else None,
        REPETITION: repetition,
        FRAGMENT: _fragment(text, words if letters is None else None, form, ended),
        NOT_ENGLISH: letters or (None if repetition else _other_words(text, form)),  # a loop is no sample of a language
    }
    return [Failure(kind, evidence) for kind, evidence in found.items() if evidence]


def words_of(text: str) -> list[str]:
    """The words, in small letters."""
    return [word.lower() for word in WORD.findall(text)]


def _loop(words: Sequence[str], form: Form) -> str | None:
    """The passage that stands most often back to back with itself, if that is often enough."""
    found = [
        (times, period, start)
        for period in range(1, min(MAX_PERIOD, len(words) // 2) + 1)
        for times, start in [_most_in_a_row(words, period)]
        if times >= min(most for length, most in LOOPS[form].items() if period >= length)
    ]
    if not found:
        return None
    times, period, start = max(found, key=lambda one: (one[0], -one[1]))
    return f"{times} times in a row: {_shown(words[start : start + period])}"


def _most_in_a_row(words: Sequence[str], period: int) -> tuple[int, int]:
    """How many times in a row a passage of `period` words stands at most, and where the first of them begins."""
    best, begin, run = 1, 0, 0
    for place in range(period, len(words)):
        run = run + 1 if words[place] == words[place - period] else 0
        if run // period + 1 > best:
            best, begin = run // period + 1, place - period - run + 1
    return best, begin


def _sentence_again(text: str) -> str | None:
    sentences = (" ".join(words_of(sentence)) for sentence in SENTENCE.split(text))
    counts = Counter(sentence for sentence in sentences if len(sentence.split()) >= SENTENCE_WORDS)
    if not counts:
        return None
    ((sentence, times),) = counts.most_common(1)
    return f"{times} times the sentence {_shown(sentence.split())}" if times > 1 else None


def duplicates(words: Sequence[str]) -> tuple[float, str]:
    """The share of passages of NGRAM words that came before, 0 where there are too few, and what shows it."""
    counts = Counter(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    if counts.total() < DUPLICATE_NGRAMS:
        return 0.0, ""
    share, ((ngram, times),) = 1 - len(counts) / counts.total(), counts.most_common(1)
    return share, f"{share:.0%} of the {NGRAM}-word passages came before, {_shown(ngram)} {times} times"


def _fragment(text: str, words: Sequence[str] | None, form: Form, ended: bool | None) -> str | None:
    """`words`: None where the text is in a script that may not part them."""
    if debris := DEBRIS.search(text):
        return f"debris of a template: {debris[0]!r}"
    if BARE_BULLET.search(text):
        return "a bullet without text"
    if words is None:
        return None
    if len(words) < LEAST_WORDS[form]:
        return f"{len(words)} words"
    if form == "prose" and text.lstrip()[0] in ",;:)":
        return f"begins with {text.lstrip()[0]!r}"
    first = WORD.search(text)[0]
    if form == "prose" and first in OPEN_STARTS:
        return f"begins in mid-sentence: {_shown(words[:6])}"
    text = text.rstrip()
    if ended is False:  # and so cut off already
        return None
    if text[-1] in ",;:(-–—/&" or (words[-1] in OPEN_ENDS and not SENTENCE_END.search(text)):
        return f"ends in mid-sentence: {_tail(text)}"
    return None


def _other_letters(text: str) -> str | None:
    letters = [character for character in QUOTED.sub(" ", text) if character.isalpha()]  # signs may say what they like
    foreign = sum(not (ord(letter) < 0x250 or 0x1E00 <= ord(letter) < 0x1F00) for letter in letters)
    if not letters or foreign / len(letters) < FOREIGN_SHARE:
        return None
    return f"{foreign} of {len(letters)} letters are not Latin"


def _other_words(text: str, form: Form) -> str | None:
    words = words_of(QUOTED.sub(" ", text))
    known = sum(word in FUNCTION_WORDS for word in words)
    if len(words) < FUNCTION_SHARE_WORDS or known / len(words) >= FUNCTION_SHARE[form]:
        return None
    return f"{known} of {len(words)} words are English function words: {_shown(words[:8])}"


def _shown(words: Sequence[str]) -> str:
    text = " ".join(words)
    return f"“{text if len(text) <= 80 else text[:77] + '...'}”"


def _tail(text: str) -> str:
    text = " ".join(text.split())
    return f"“{text if len(text) <= 60 else '...' + text[-57:]}”"
