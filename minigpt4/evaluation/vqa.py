"""Benchmarks of visual question answering: how checkpoints are asked, what counts as right, what is published."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes
from minigpt4.evaluation import hallucination, science_qa, vqa_data, vqa_scores
from minigpt4.evaluation.caption_data import require_same_ids
from minigpt4.evaluation.generate import NamedCheckpoint, setup_metadata
from minigpt4.evaluation.questions import ask, read_json
from minigpt4.evaluation.vqa_data import GQA_CHOICES, Files, Read, ResultForm, checked
from minigpt4.evaluation.yes_no import yes_no

Rank = Literal["sum", "mean"]
"""Of the losses of a choice's tokens, the end symbol included."""
Key = int | str
Texts = Mapping[Key, str]
"""Answers by question_id."""
Scores = dict[Key, float]


# What counts as right, of a scorer, answers, records and whether missing answers are an error; and further figures

Records = Sequence[Mapping[str, Any]]


def _each(key: str, match: Callable[[str, Mapping[str, Any]], bool]) -> Callable[..., Scores]:
    """A look at an answer and its record, whose id is `key`; a missing answer is wrong."""
    return lambda scorer, said, records, strict: {
        one[key]: float(one[key] in said and match(said[one[key]], one)) for one in records
    }


def _vqa(scorer: str, said: Texts, records: Records, strict: bool) -> Scores:
    return vqa_scores.breakdown(said, records, vqa_scores.VQA[scorer]).per_question


def _vizwiz(scorer: str, said: Texts, records: Records, strict: bool) -> Scores:
    return vqa_scores.breakdown(said, records, vqa_scores.VIZWIZ[scorer], "image").per_question


def _aokvqa(scorer: str, said: Texts, records: Records, strict: bool) -> Scores:
    return vqa_scores.aokvqa_choices(said, records, strict=strict)


def _aokvqa_direct(scorer: str, said: Texts, records: Records, strict: bool) -> Scores:
    return vqa_scores.aokvqa_direct(said, records, scorer, strict=strict)


def _gqa(scorer: str, said: Texts, records: Records, strict: bool) -> Scores:
    """Of balanced questions, as all are in MiniGPT-4's list."""
    counted = [one for one in records if one.get("isBalanced", True)]
    return {
        (key := one["question_id"]): float(vqa_scores.gqa_matches(said[key], one["answer"], scorer)) for one in counted
    }


def _gqa_figures(scorer: str, said: Texts, records: Records, files: Files) -> dict[str, Any]:
    """The official ones, of the publisher's form, where a scorer leaves the answers of the file as they are."""
    if scorer in ("lavis", "lmms") or "types" not in records[0]:
        return {}
    choices, questions = None, {one["question_id"]: one for one in records}
    if files.choices:
        choices = checked(GQA_CHOICES, read_json(files.choices), files.choices)
        require_same_ids(questions, [key for key in choices if key in questions], f"{files.choices}: ")
    clean = vqa_scores.GQA_ANSWERS[scorer]
    return vqa_scores.gqa({key: clean(text) for key, text in said.items()}, questions, choices)


def _vizwiz_figures(scorer: str, said: Texts, records: Records, files: Files) -> dict[str, Any]:
    pairs = [
        (one.get("answerable") == 0, vqa_scores.normalised(said[one["image"]]) == "unanswerable") for one in records
    ]
    hits, total = sum(map(all, pairs)), sum(map(sum, pairs))
    return {"F1 of unanswerable": 2 * hits / total if total else None}


def _hateful_figures(scorer: str, said: Texts, records: Records, files: Files) -> dict[str, Any]:
    scores = [{1: 1.0, 0: 0.0, None: 0.5}[vqa_scores.hateful(said[one["id"]])] for one in records]
    return {"AUROC of yes, neither, no": vqa_scores.auroc([one["label"] for one in records], scores)}


def _nearest_figures(scorer: str, said: Texts, records: Records, files: Files) -> dict[str, Any]:
    """Multiple choice by the choice that is nearest to a direct answer, where the user has a file of word vectors."""
    if files.vectors is None:
        return {}
    pairs = [(said.get(one["question_id"], ""), one["choices"]) for one in records]
    vectors = vqa_scores.read_vectors(files.vectors, [text for answer, own in pairs for text in (answer, *own)])
    picks = [vqa_scores.nearest_choice(text, own, vectors) for text, own in pairs]
    right = [pick == one["correct_choice_idx"] for pick, one in zip(picks, records, strict=True)]
    return {"multiple choice by nearest choice": float(np.mean(right))}


# The benchmarks


@dataclass(frozen=True)
class Benchmark:
    """How one is answered, scored and handed in."""

    title: str
    read: Callable[[Files], Read]
    form: ResultForm
    gold: str
    """Field of a record that has the answer."""
    rules: Mapping[str, str]
    """What counts as right by scorer, the default first."""
    score: Callable[[str, Texts, Records, bool], Scores]
    figures: Callable[[str, Texts, Records, Files], dict[str, Any]] = lambda *_: {}
    is_ranked: bool = False
    """The likeliest of the choices is the answer; else it is generated."""
    missing_is_wrong: bool = False
    """With `--partial`; else questions without an answer do not count."""
    is_read: Callable[[str], bool] | None = None
    """Whether an answer is one of the two that there are."""


OTHERS = "mean over the answers of min(1, matches among the others / 3)"
VQA_RULES = {
    "official": f"{OTHERS}; both sides normalised, unless all answers are the same",
    "minigpt4": f"{OTHERS}; both sides normalised, unless all answers are the same, and in lower case",
    "lavis": f"{OTHERS}; the prediction normalised, of the answers the signs alone",
    "lmms": f"{OTHERS}; both sides normalised as EvalAI does",
}
BY_ID = ResultForm("list", "question_id", "answer")
BENCHMARKS = {
    "vqav2": Benchmark("VQAv2", vqa_data.read_vqa, BY_ID, "answers", VQA_RULES, _vqa),
    "okvqa": Benchmark("OK-VQA", vqa_data.read_vqa, BY_ID, "answers", VQA_RULES, _vqa),
    "aokvqa": Benchmark(
        "A-OKVQA MC",
        vqa_data.read_aokvqa,
        ResultForm("by id", "question_id", "multiple_choice"),
        "correct_choice_idx",
        {"official": "the text of the right choice"},
        _aokvqa,
        is_ranked=True,
        missing_is_wrong=True,
    ),
    "aokvqa_direct": Benchmark(
        "A-OKVQA direct",
        vqa_data.read_aokvqa,
        ResultForm("by id", "question_id", "direct_answer"),
        "direct_answers",
        {
            "official": "min(1, matches / 3), nothing normalised; without the difficult questions",
            "lavis": "min(1, matches / 3), nothing normalised; the difficult questions, too",
        },
        _aokvqa_direct,
        _nearest_figures,
        missing_is_wrong=True,
    ),
    "gqa": Benchmark(
        "GQA",
        vqa_data.read_gqa,
        ResultForm("list", "questionId", "prediction"),
        "answer",
        {
            "official": "the answer as it is",
            "minigpt4": "the prediction in lower case",
            "llava": "the prediction in lower case, without periods at its end",
            "lavis": "both sides normalised by the VQA rules",
            "lmms": "both sides in lower case, without punctuation",
        },
        _gqa,
        _gqa_figures,
    ),
    "vizwiz": Benchmark(
        "VizWiz",
        vqa_data.read_vizwiz,
        ResultForm("list", "image", "answer"),
        "answers",
        {
            "official": f"{OTHERS}; the prediction normalised",
            "minigpt4": "min(1, matches / 3) of all answers, in lower case, parted at _",
            "lmms": VQA_RULES["lmms"],
        },
        _vizwiz,
        _vizwiz_figures,
    ),
    "iconqa": Benchmark(
        "IconQA",
        vqa_data.read_iconqa,
        ResultForm("list", "image_id", "answer"),
        "answer",
        {"official": "the text of the right choice"},
        _each("image_id", lambda text, one: text == one["choices"][one["answer"]]),
        is_ranked=True,
    ),
    "vsr": Benchmark(
        "VSR",
        vqa_data.read_vsr,
        BY_ID,
        "label",
        {"minigpt4": "`true` or `false` in whatever case, blanks count"},
        _each("question_id", lambda text, one: vqa_scores.vsr(text, one["label"])),
        is_read=lambda text: text.lower() in ("true", "false"),
    ),
    "hateful_memes": Benchmark(
        "Hateful Memes",
        vqa_data.read_hateful_memes,
        ResultForm("list", "id", "answer"),
        "label",
        {"minigpt4": "`yes` or `no` in whatever case, alone"},
        _each("id", lambda text, one: vqa_scores.hateful(text) == one["label"]),
        _hateful_figures,
        is_read=lambda text: vqa_scores.hateful(text) is not None,
    ),
    "pope": Benchmark(
        "POPE",
        vqa_data.read_pope,
        ResultForm("lines", "question_id", "answer"),
        "label",
        {"official": "yes, unless the first sentence has the word No, no or not"},
        _each("question_id", lambda text, one: vqa_scores.pope(text) == (one["label"] == hallucination.YES)),
        is_read=lambda text: yes_no(text) is not None,
    ),
    "science_qa": Benchmark(
        "ScienceQA",
        vqa_data.read_science_qa,
        ResultForm("lines", "question_id", "text"),
        "answer",
        {"official": "the letter alone, in front as `B. `, or in exactly one `The answer is B.`"},
        _each("id", lambda text, one: science_qa.choice_of(science_qa.find_letter(text), one) == one["answer"]),
        missing_is_wrong=True,
    ),
}
"""By name on the command line."""
UNKNOWN = "protocol not known"
SECOND_HAND = "second hand, protocol not known"
LAVIS = "LAVIS's config: `Question: {} Short answer:`, 5 beams, at most 10 tokens"
PUBLISHED: dict[str, tuple[str, dict[str, float]]] = {
    "BLIP-2": (UNKNOWN, {"aokvqa": 80.2, "gqa": 42.4}),
    "MiniGPT-4": (UNKNOWN, {"aokvqa": 58.2, "gqa": 32.2}),
    "MiniGPT-4 without Q-Former": (UNKNOWN, {"aokvqa": 56.9, "gqa": 33.4}),
    "MiniGPT-4, three linear layers": (UNKNOWN, {"aokvqa": 49.7, "gqa": 31.0}),
    "MiniGPT-4, Q-Former finetuned, too": (UNKNOWN, {"aokvqa": 52.1, "gqa": 28.0}),
    "MiniGPT-4, LoRA on Vicuna, VQA sets in stage 2": (UNKNOWN, {"aokvqa": 67.2, "gqa": 43.5}),
    "BLIP-2 FlanT5-XL, zero-shot": (LAVIS, {"gqa": 43.98, "okvqa": 41.22, "vqav2": 63.13}),
    "BLIP-2 OPT-2.7B, zero-shot": (LAVIS, {"vqav2": 51.88}),
    "BLIP-2 Vicuna-7B, zero-shot": (SECOND_HAND, {"gqa": 38.6, "vsr": 50.0, "iconqa": 39.7, "vizwiz": 25.3}),
    "InstructBLIP Vicuna-7B, zero-shot": (SECOND_HAND, {"gqa": 49.2, "vsr": 54.3, "iconqa": 43.1, "vizwiz": 34.5}),
    "MiniGPT-v2, trained on most of these": (
        SECOND_HAND,
        {"gqa": 60.3, "okvqa": 56.9, "vsr": 60.6, "iconqa": 47.7, "hateful_memes": 58.2},
    ),
}
"""Accuracies in percent, with what is known of how they were measured."""


# Asking


def ask_checkpoints(
    benchmark: Benchmark,
    cfg: Config,
    checkpoints: Sequence[NamedCheckpoint],
    read: Read,
    images: Path,
    folder: Path,
    prompt: str,
    processes: Processes,
) -> tuple[dict[str, Any], list[dict[str, Texts]] | None]:
    """How was asked; and on rank 0 each checkpoint's answers, where choices are ranked by rule, `sum` or `mean`.

    Errors are those of `questions.ask`; every rank must call it.
    """
    ids = {str(one.question_id): one.question_id for one in read.questions}
    choices = {str(one.question_id): one.record["choices"] for one in read.questions} if benchmark.is_ranked else None
    rules, said = ask(cfg, checkpoints, read.questions, images, folder, prompt, processes, choices)
    setup = setup_metadata(cfg, rules)
    if choices is None:
        return setup, said and [{"generated": {ids[key]: answer.text for key, answer in own.items()}} for own in said]
    setup["decoding"] = {"choices": "ranked by likelihood, each by itself"}
    setup["batch_size"] = 1
    return setup, said and [
        {
            rule: {
                ids[key]: choices[key][vqa_scores.pick(json.loads(answer.text), rule)] for key, answer in own.items()
            }
            for rule in get_args(Rank)
        }
        for own in said
    ]
