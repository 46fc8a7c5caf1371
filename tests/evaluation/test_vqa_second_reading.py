"""The rules of normalising answers read a second time, sign by sign, on generated texts.

Nothing here is taken from vqa_scores.py: both must agree on thousands of made-up texts. What they score is checked on
the cases of the published scorers, in test_vqa_scores.py.
"""

import random
import re

from minigpt4.evaluation import vqa_scores

TEXTS = 11_000
GOES = ';/[]"{}()=+\\_-><@`,?!'
WORDS_OF_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'d've": "he it she somebody someone something there they we who you",
}
WHOLE = [f"{stem}{ending}" for ending, stems in ENDINGS.items() for stem in stems.split()]
WHOLE += ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've", "'ow's'at"]
WHOLE += [f"{stem}n't've" for stem in ["could", "had", "might", "should", "would"]]
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
    threes = zip(text, text[1:], text[2:], strict=False)
    number = any(b == "," and a.isdecimal() and c.isdecimal() for a, b, c in threes)
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


# Generated answers

WORDS = """
dog Dog two Two none ten eleven a the An yes no Yes. unanswerable tea 3.5 .5 10,000 1,5 3. a.m. no.5 dog.cat U.S.A.
\u0663,\u0664 caf\u00e9 #1 50% dont cant im let's lets dog's somebody'd yall'd've y'alld've ow's'at <unk>
"""
PIECES = [*WORDS.split(), *WHOLE, *WRITTEN]
JOINTS = [" ", " ", " ", "  ", "", "\n", "\t", "\r", "\u00a0", "_", *GOES, " - ", ", ", "? ", "/", "...", ". "]


def generated(draw: random.Random) -> str:
    text = "".join(draw.choice(PIECES) + draw.choice(JOINTS) for _ in range(draw.randint(1, 4)))
    if draw.random() < 0.02:
        text += draw.choice(["." * 40, ". " * 40, ".x" * 40])
    return text if draw.random() < 0.5 else text.strip()


def test_texts_become_the_same():
    draw = random.Random(20)
    texts = [generated(draw) for _ in range(TEXTS)]
    wrong = [text for text in texts if vqa_scores.normalised(text) != usual(text)]
    wrong += [text for text in texts if vqa_scores.evalai_normalised(text) != evalai(text)]
    wrong += [text for text in texts if vqa_scores.GQA_ANSWERS["lavis"](text) != worded(unsigned(text))]
    assert not wrong, f"{len(wrong)} of {3 * TEXTS}: {wrong[:5]!r}"
    assert len({usual(text) for text in texts}) > TEXTS / 2
