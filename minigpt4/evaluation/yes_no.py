"""Yes or no in what people and models write; what is neither is None."""

import re
from collections.abc import Sequence

THOUGHT = re.compile(r"<think>.*?(</think>|\Z)|\A(?:(?!<think>).)*</think>", re.DOTALL | re.IGNORECASE)
"""The first tag is missing where a server put it into the prompt."""
WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
FIRST = re.compile(r"\W*(yes|no|yeah|yep|nope)\b", re.IGNORECASE)
NUMBERED = re.compile(r"\W*(?:caption|line|number)?\W*(\d+)\W+(yes|no)\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")
UNSURE = re.compile(
    r"\b(?:not (?:sure|certain|clear|possible|able)|unsure|unclear|cannot (?:tell|say|determine)|"
    r"(?:can't|can not|don't|do not) (?:tell|say|know|determine)|maybe|perhaps|possibly|might|may be|sorry)\b"
)
SHOWS = r"(?:show|have|has|contain|feature|include|depict|see)s?"
DENIAL = re.compile(
    rf"\bthere (?:is|are|was|were)(?: no| not|n't)\b|\bthere's (?:no|not)\b|\b{SHOWS} (?:no|not)\b|"
    rf"\b(?:does not|doesn't|do not|don't|cannot|can't|can not) (?:\w+ )?(?:{SHOWS}|appear)\b"
)
AFFIRMATION = re.compile(
    rf"\bthere(?: is| are|'s)\b|\bi (?:can )?see\b|\b(?:image|picture|photo|scene) (?:\w+ )?{SHOWS}\b"
)


def yes_no(answer: str) -> bool | None:
    """Whether an answer says yes.

    By its first word; else by the one of `yes` and `no` that its first sentence holds; else by a statement such as
    `there is no dog` or `I see a dog`. None for what is unsure, contradicts itself or speaks of other things.
    """
    answer = without_thought(answer).replace("\u2019", "'")
    if first := FIRST.match(answer):
        return first[1].lower().startswith("y")
    sentence = SENTENCE_END.split(answer, maxsplit=1)[0].lower()
    if UNSURE.search(sentence):
        return None
    said = set(WORD.findall(sentence))
    if DENIAL.search(sentence):
        return None if "yes" in said else False
    affirms = AFFIRMATION.search(sentence) is not None
    if len(said) == 1:
        return True if said == {"yes"} else None if affirms else False
    return True if not said and affirms else None


def yes_no_lines(answer: str, count: int) -> list[bool] | None:
    """`count` answers, one a line as `1. yes`, as `yes`, or all in one line; None unless there are exactly so many.

    Numbered lines may have words of explanation behind them, and any order.
    """
    lines = [line for line in without_thought(answer).splitlines() if line.strip()]
    numbered = [(int(found[1]), found[2]) for line in lines if (found := NUMBERED.match(line))]
    if len(numbered) > 1 or count == 1 == len(numbered):
        by_number = dict(numbered)
        whole = len(numbered) == len(by_number) and by_number.keys() == set(range(1, count + 1))
        return _are_yes([by_number[number] for number in range(1, count + 1)]) if whole else None
    plain = [found[1] for line in lines if (found := re.match(r"\W*(yes|no)\b", line, re.IGNORECASE))]
    words = plain if len(plain) == count else WORD.findall(without_thought(answer))
    return _are_yes(words) if len(words) == count else None


def without_thought(answer: str) -> str:
    """The answer of a model that thinks aloud first."""
    return THOUGHT.sub("", answer).strip()


def _are_yes(words: Sequence[str]) -> list[bool]:
    return [word.lower() == "yes" for word in words]
