"""What answers to visual questions score, by the rules of each benchmark and of each code that scores it.

Sources: the VQA 2.0 evaluator (GT-Vision-Lab/VQA), which OK-VQA, VizWiz, LAVIS, LLaVA and lmms-eval take over with
changes; the evaluators of A-OKVQA (allenai/aokvqa) and GQA; eval_scripts/eval_vqa.py of Vision-CAIR/MiniGPT-4. Scores
are shares from 0 to 1, unrounded. The scores of POPE are in hallucination.py.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from minigpt4.common.errors import ConfigError, SampleError, errors_as, require_same_ids

Scorer = Literal["official", "minigpt4", "lavis", "lmms"]
"""Whose rules: `lmms` are EvalAI's, which TextVQA, LLaVA and lmms-eval use; `minigpt4` of VQA is that for OK-VQA."""
SCORERS = get_args(Scorer)
Answers = Sequence[str]
"""Of people to one question, ten as a rule."""

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32
"""So many go at most: the official code hands a flag of that value over as the number of replacements."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
ARTICLES = ("a", "an", "the")
ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
MORE_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll y'all'd've 'ow's'at
"""
CONTRACTIONS = {whole.replace("'", ""): whole for whole in ONE_APOSTROPHE.split()}
CONTRACTIONS |= {
    whole[:place] + whole[place + 1 :]: whole
    for whole in MORE_APOSTROPHES.split()
    for place, sign in enumerate(whole)
    if sign == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"
"""By what people write. The official table has four more, which words in lower case never meet, and two that change
nothing."""
UNKNOWN = "<unk>"


# Normalisation


def one_line(text: str) -> str:
    """Line feeds and tabs as blanks, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_signs(text: str) -> str:
    """A sign that somewhere stands beside a blank goes without a trace, as do all where a comma stands in a number; the
    others become blanks. Then the periods go that no digit follows."""
    all_go, cleaned = COMMA_IN_NUMBER.search(text) is not None, text
    for sign in SIGNS:
        goes = all_go or f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if goes else " ")
    return PERIOD.sub("", cleaned, count=PERIODS)


def plain_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalised(text: str) -> str:
    """A text by the VQA rules."""
    return plain_words(without_signs(one_line(text)))


def evalai_normalised(text: str) -> str:
    """The same as EvalAI has it: commas and question marks go first, and `'s` becomes a word."""
    return normalised(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


# VQAv2, OK-VQA, VizWiz


def consensus(prediction: str, answers: Answers) -> float:
    """VQA accuracy: the mean, over the answers, of min(1, matches among the others / 3)."""
    matches = Counter(answers)[prediction]
    each = [min(1.0, (matches - (answer == prediction)) / 3) for answer in answers]
    return sum(each) / len(each)


def three_of_all(prediction: str, answers: Answers) -> float:
    """min(1, matches / 3), leaving none out."""
    return min(1.0, Counter(answers)[prediction] / 3)


def _official(prediction: str, answers: Answers, change_case: Callable[[str], str] = str) -> float:
    prediction, *answers = map(one_line, [prediction, *answers])
    if len(set(answers)) > 1:  # else all compare as they are
        prediction, *answers = map(normalised, [prediction, *answers])
    return consensus(change_case(prediction), list(map(change_case, answers)))


def _lavis(prediction: str, answers: Answers) -> float:
    if len(set(answers)) > 1:
        answers = list(map(without_signs, answers))
    return consensus(normalised(prediction), answers)


def _lmms(prediction: str, answers: Answers) -> float:
    return consensus(evalai_normalised(prediction), list(map(evalai_normalised, answers)))


VQA: dict[Scorer, Callable[[str, Answers], float]] = {
    "official": _official,
    "minigpt4": lambda prediction, answers: _official(
        prediction.lower().replace(UNKNOWN, "").strip(), answers, str.lower
    ),
    "lavis": _lavis,
    "lmms": _lmms,
}
"""Accuracy of a prediction, of VQAv2 and OK-VQA."""


VIZWIZ: dict[Scorer, Callable[[str, Answers], float]] = {
    "official": lambda prediction, answers: consensus(normalised(prediction), answers),
    "minigpt4": lambda prediction, answers: three_of_all(prediction.lower(), "_".join(answers).lower().split("_")),
    "lmms": _lmms,
}
"""The same of VizWiz."""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# Choices


def pick(token_losses: Sequence[Sequence[float]], rule: Literal["sum", "mean"] = "sum") -> int:
    """Which choice is the most likely, by the losses of each choice's tokens, the end symbol last; the first of equals.

    MiniGPT-4's own rule divides the sum by the padded length of a batch, so that results change with the batch size;
    `sum` is that without the padding.
    """
    losses = [sum(own) / (len(own) if rule == "mean" else 1) for own in token_losses]
    return losses.index(min(losses))


def read_vectors(path: Path, texts: Iterable[str]) -> dict[str, np.ndarray]:
    """The vectors of the texts' words, from lines `word 0.1 -0.2 ...`, GloVe's; SampleError names a bad line."""
    words, found = {word for text in texts for word in text.lower().split()}, {}
    with errors_as(ConfigError, f"--vectors: {path} cannot be read"), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            word, *values = line.rstrip().split(" ")
            if word in words:
                with errors_as(SampleError, f"{path}, line {number}: a word and its numbers"):
                    found[word] = np.array(values, dtype=np.float64)
    return found


def nearest_choice(text: str, choices: Sequence[str], vectors: Mapping[str, np.ndarray]) -> int:
    """The number of the choice that a text is or else, by the cosine of mean vectors of words, comes nearest to; the
    first of equals. A text without known words is as near to all."""
    if text in choices:
        return choices.index(text)

    def direction(own: str) -> np.ndarray:
        mean = sum((vectors[word] for word in own.lower().split() if word in vectors), np.zeros(1))
        return mean / (np.linalg.norm(mean) or 1)

    return int(np.argmax([float((direction(text) * direction(choice)).sum()) for choice in choices]))


# GQA

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
GQA_ANSWERS: dict[Scorer | Literal["llava"], Callable[[str], str]] = {
    "official": lambda text: text,
    "minigpt4": str.lower,
    "llava": lambda text: text.rstrip(".").lower(),
    "lavis": lambda text: plain_words(without_signs(text)),
    "lmms": lambda text: text.lower().translate(NO_PUNCTUATION),
}
"""What is done to a prediction; LAVIS and lmms-eval do it to the answer, too."""
COMMON = ("color", "material", "shape")
NO_STEP = ("exist", "query: name", "choose name")


def gqa_matches(prediction: str, answer: str, scorer: str = "official") -> bool:
    """Whether a prediction is the answer."""
    clean = GQA_ANSWERS[scorer]
    return clean(prediction) == (clean(answer) if scorer in ("lavis", "lmms") else answer)


def gqa(
    predictions: Mapping[str, str],
    questions: Mapping[str, Mapping[str, Any]],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> dict[str, Any]:
    """The official figures, without grounding, of predictions that `GQA_ANSWERS` has cleaned if so wished.

    Balanced questions count, and those that they entail for `consistency` (None where one of these has no prediction).
    `distribution` is no share, and the lower the better; `validity` and `plausibility` need the file of `choices`.
    Groups hold means and numbers of questions. SampleError where a balanced question has no prediction.
    """
    balanced = {key: one for key, one in questions.items() if one["isBalanced"]}
    require_same_ids(balanced, [key for key in predictions if key not in questions or key in balanced])
    right = {key: predictions[key] == one["answer"] for key, one in questions.items() if key in predictions}
    lists: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    gold, said = defaultdict(Counter), defaultdict(Counter)
    for key, one in balanced.items():
        lists["accuracy"].append(right[key])
        lists["open" if one["types"]["structural"] == "query" else "binary"].append(right[key])
        steps = [f"{step['operation']}: {step['argument']}" for step in one["semantic"]]
        groups["structural"][one["types"]["structural"]].append(right[key])
        groups["semantic"][one["types"]["semantic"]].append(right[key])
        groups["steps"][sum(not any(name in step for name in NO_STEP) for step in steps)].append(right[key])
        groups["words"][len(one["question"].split())].append(right[key])
        for name, kind in (("validity", "valid"), ("plausibility", "plausible")):
            if choices is not None:
                known = COMMON if "Common" in one["types"]["detailed"] else choices[key][kind]
                lists[name].append(predictions[key] in known)
        entailed = [right.get(other) for other in one["entailed"] if other != key]
        if right[key] and entailed:
            lists["consistency"].append(None if None in entailed else _mean(entailed))
        if (group := one["groups"]["global"]) is not None:
            gold[group][one["answer"]] += 1
            said[group][predictions[key]] += 1
    figures = ("accuracy", "binary", "open", "consistency", "validity", "plausibility")
    found = {name: _mean(lists[name]) if lists[name] and None not in lists[name] else None for name in figures}
    means = {name: {value: (_mean(own), len(own)) for value, own in sorted(by.items())} for name, by in groups.items()}
    return {**found, "distribution": _distribution(gold, said), "groups": means}


def _distribution(gold: Mapping[str, Counter], said: Mapping[str, Counter]) -> float | None:
    """Chi-square of predicted counts against those of the answers, weighted by the size of groups, over 100."""
    sizes = {group: counts.total() for group, counts in gold.items()}
    if not sizes:
        return None
    chi = {
        group: sum((said[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in gold.items()
    }
    return sum(chi[group] * size for group, size in sizes.items()) / sum(sizes.values()) / 100


# Two answers: Hateful Memes, POPE


def hateful(prediction: str) -> int | None:
    """1 for `yes`, 0 for `no`, blanks and case aside; None for all else, which is wrong and to be counted."""
    return {"yes": 1, "no": 0}.get(prediction.lower().strip())


def pope(prediction: str) -> bool:
    """Whether an answer says yes, as POPE's own code and LLaVA's have it: unless its first sentence holds the word
    `No`, `no` or `not`. `yes_no` of yes_no.py tells what is neither."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def auroc(labels: Sequence[int], scores: Sequence[float]) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, equals by half; None without both."""
    labels_N, scores_N = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    positives, negatives = int(labels_N.sum()), int((~labels_N).sum())
    if not positives or not negatives:
        return None
    _, place_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[place_N][labels_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))
