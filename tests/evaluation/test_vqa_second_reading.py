"""The rules of visual questions read a second time, sign by sign and in fractions, on generated answers.

Nothing here is taken from vqa_scores.py: both must agree on thousands of made-up texts.
"""

import random
import re
from fractions import Fraction

import pytest

from minigpt4.evaluation import vqa_scores

QUESTIONS, ANSWERS = 1000, 10
GOES = ';/[]"{}()=+\\_-><@`,?!'
WORDS_OF_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
}
WHOLE = [f"{stem}{ending}" for ending, stems in ENDINGS.items() for stem in stems.split()]
WHOLE += ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've", "'ow's'at"]
WHOLE += [f"{stem}n't've" for stem in ["could", "had", "might", "should", "would"]]
WHOLE += [
    f"{stem}'d've"
    for stem in ["he", "it", "she", "somebody", "someone", "something", "there", "they", "we", "who", "you"]
]
WRITTEN = {"somebody'd": "somebodyd"}
for whole in WHOLE:
    places = [found.start() for found in re.finditer("'", whole)]
    WRITTEN |= {whole[:place] + whole[place + 1 :]: whole for place in places}


# The second reading


def stripped(text: str) -> str:
    spaced = "".join(" " if sign in "\n\t" else sign for sign in text)
    return re.sub(r"\A\s+|\s+\Z", "", spaced)


def unsigned(text: str) -> str:
    """One pass over the signs; then one over the periods, with a count of those that went."""
    pairs = list(zip(text, text[1:], strict=False))
    beside_blank = {a for a, b in pairs if b == " "} | {b for a, b in pairs if a == " "}
    number = any(
        b == "," and a.isdecimal() and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )
    kept = [sign if sign not in GOES else "" if number or sign in beside_blank else " " for sign in text]
    text, gone, out = "".join(kept), 0, []
    for place, sign in enumerate(text):
        follows = text[place + 1 : place + 2]
        if sign == "." and not follows.isdecimal() and gone < 32:
            gone += 1
        else:
            out.append(sign)
    return "".join(out)


def worded(text: str) -> str:
    out = []
    for word in text.lower().split():
        if word == "none":
            word = "0"
        elif word in WORDS_OF_NUMBERS:
            word = str(WORDS_OF_NUMBERS.index(word))
        if word not in {"a", "an", "the"}:
            out.append(WRITTEN.get(word, word))
    return " ".join(out)


def usual(text: str) -> str:
    return worded(unsigned(stripped(text)))


def evalai(text: str) -> str:
    text = re.sub("[,?]", "", text.lower())
    return usual(re.sub("'s", " 's", text))


def leave_one_out(said: str, answers: list[str]) -> Fraction:
    """The m who match see m - 1 others who do, everyone else sees m."""
    m, n = sum(said == one for one in answers), len(answers)
    total = m * min(Fraction(1), Fraction(max(m - 1, 0), 3)) + (n - m) * min(Fraction(1), Fraction(m, 3))
    return total / n


def of_three(said: str, answers: list[str]) -> Fraction:
    return Fraction(min(3, sum(said == one for one in answers)), 3)


def official(said: str, answers: list[str]) -> Fraction:
    said, answers = stripped(said), [stripped(one) for one in answers]
    if any(one != answers[0] for one in answers):
        said, answers = usual(said), [usual(one) for one in answers]
    return leave_one_out(said, answers)


def minigpt4(said: str, answers: list[str]) -> Fraction:
    said, answers = stripped(said.lower().replace("<unk>", "").strip()), [stripped(one) for one in answers]
    if any(one != answers[0] for one in answers):
        said, answers = usual(said), [usual(one) for one in answers]
    return leave_one_out(said.lower(), [one.lower() for one in answers])


def lavis(said: str, answers: list[str]) -> Fraction:
    same = all(one == answers[0] for one in answers)
    return leave_one_out(usual(said), answers if same else [unsigned(one) for one in answers])


def lmms(said: str, answers: list[str]) -> Fraction:
    return leave_one_out(evalai(said), [evalai(one) for one in answers])


def vizwiz(said: str, answers: list[str]) -> Fraction:
    return leave_one_out(usual(said), answers)


def vizwiz_minigpt4(said: str, answers: list[str]) -> Fraction:
    return of_three(said.lower(), [part for one in answers for part in one.lower().split("_")])


SCORERS = {
    "VQA official": (official, vqa_scores.VQA["official"]),
    "VQA minigpt4": (minigpt4, vqa_scores.VQA["minigpt4"]),
    "VQA lavis": (lavis, vqa_scores.VQA["lavis"]),
    "VQA lmms": (lmms, vqa_scores.VQA["lmms"]),
    "VizWiz official": (vizwiz, vqa_scores.VIZWIZ["official"]),
    "VizWiz minigpt4": (vizwiz_minigpt4, vqa_scores.VIZWIZ["minigpt4"]),
    "A-OKVQA direct": (of_three, vqa_scores.three_of_all),
}


# Generated answers

PIECES = [
    *(
        "dog",
        "Dog",
        "two",
        "Two",
        "none",
        "ten",
        "eleven",
        "a",
        "the",
        "An",
        "yes",
        "no",
        "Yes.",
        "unanswerable",
        "tea",
    ),
    *(
        "3.5",
        ".5",
        "10,000",
        "1,5",
        "3.",
        "a.m.",
        "no.5",
        "dog.cat",
        "U.S.A.",
        "\u0663,\u0664",
        "caf\u00e9",
        "#1",
        "50%",
    ),
    *("dont", "cant", "im", "let's", "lets", "dog's", "somebody'd", "yall'd've", "y'alld've", "ow's'at", "<unk>"),
    *WHOLE,
    *WRITTEN,
]
JOINTS = [" ", " ", " ", "  ", "", "\n", "\t", "\r", "\u00a0", "_", *GOES, " - ", ", ", "? ", "/", "...", ". "]


def generated(draw: random.Random) -> str:
    text = "".join(draw.choice(PIECES) + draw.choice(JOINTS) for _ in range(draw.randint(1, 4)))
    if draw.random() < 0.02:
        text += draw.choice(["." * 40, ". " * 40, ".x" * 40])
    return text if draw.random() < 0.5 else text.strip()


def changed(draw: random.Random, text: str) -> str:
    """Another writing of a text, which rules may or may not take for the same."""
    how = draw.randrange(8)
    marks = [text, text.upper(), text.lower(), f"the {text}", f"{text}.", f" {text}", text.replace(" ", "-"), text]
    return marks[how] if draw.random() < 0.9 else generated(draw)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, list[str]]]:
    draw, found = random.Random(20), []
    for _ in range(QUESTIONS):
        said = generated(draw) if draw.random() < 0.7 else draw.choice(PIECES)
        kinds = [changed(draw, said) for _ in range(draw.randint(1, 4))]
        found.append((said, [draw.choice(kinds) for _ in range(ANSWERS)]))
    return found


def test_texts_become_the_same(pairs):
    texts = [text for said, answers in pairs for text in (said, *answers)]
    wrong = [text for text in texts if vqa_scores.normalised(text) != usual(text)]
    wrong += [text for text in texts if vqa_scores.evalai_normalised(text) != evalai(text)]
    assert not wrong, f"{len(wrong)} of {2 * len(texts)}: {wrong[:5]!r}"
    assert len(texts) == 11_000


@pytest.mark.parametrize("name", SCORERS)
def test_answers_score_the_same(pairs, name):
    second, ours = SCORERS[name]
    scores = [(second(*pair), ours(*pair)) for pair in pairs]
    wrong = [pair for pair, (a, b) in zip(pairs, scores, strict=True) if abs(float(a) - b) > 1e-12]
    assert not wrong, f"{len(wrong)} of {len(pairs)}: {wrong[:3]!r}"
    assert len({a for a, _ in scores}) >= 4  # none, some and all match


def test_gqa_answers_match_the_same(pairs):
    marks = re.compile(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]")
    rules = {
        "official": lambda said, answer: said == answer,
        "minigpt4": lambda said, answer: said.lower() == answer,
        "llava": lambda said, answer: re.sub(r"\.+\Z", "", said).lower() == answer,
        "lavis": lambda said, answer: worded(unsigned(said)) == worded(unsigned(answer)),
        "lmms": lambda said, answer: marks.sub("", said.lower()) == marks.sub("", answer.lower()),
    }
    for scorer, rule in rules.items():
        found = [(said, answers[0]) for said, answers in pairs]
        wrong = [pair for pair in found if rule(*pair) != vqa_scores.gqa_matches(*pair, scorer)]
        assert not wrong, f"{scorer}: {wrong[:3]!r}"
        assert 0 < sum(rule(*pair) for pair in found) < len(found)
