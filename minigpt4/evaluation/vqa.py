"""Benchmarks of visual question answering: how checkpoints are asked, what counts as right, what is published."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from minigpt4.common.binding import checked
from minigpt4.common.errors import require_same_ids
from minigpt4.evaluation import hallucination, science_qa, vqa_data, vqa_scores
from minigpt4.evaluation.command import EvaluationRun
from minigpt4.evaluation.questions import read_json
from minigpt4.evaluation.vqa_data import GQA_CHOICES, Files, QuestionSet, ResultForm, VqaQuestion
from minigpt4.evaluation.yes_no import yes_no

Rank = Literal["sum", "mean"]
"""Of the losses of a choice's tokens, the end symbol included."""
Texts = Mapping[int | str, str]
"""Answers by question_id."""
Scores = dict[int | str, float]
Record = Mapping[str, Any]
Match = Callable[[str, str, Record], float]
"""What a scorer gives for an answer, by its record: from 0 to 1."""


# Figures beside the accuracy


def _gqa_figures(scorer: str, said: Texts, questions: Sequence[VqaQuestion], files: Files) -> dict[str, Any]:
    """The official ones, of the publisher's form, where a scorer leaves the answers of the file as they are."""
    records, choices = {one.question_id: one.record for one in questions}, None
    if scorer in ("lavis", "lmms") or "types" not in questions[0].record:
        return {}
    if files.choices:
        choices = checked(GQA_CHOICES, read_json(files.choices), files.choices)
        require_same_ids(records, [key for key in choices if key in records], f"{files.choices}: ")
    clean = vqa_scores.GQA_ANSWERS[scorer]
    return vqa_scores.gqa({key: clean(text) for key, text in said.items()}, records, choices)


def _vizwiz_figures(scorer: str, said: Texts, questions: Sequence[VqaQuestion], files: Files) -> dict[str, Any]:
    texts = {key: vqa_scores.normalised(text) for key, text in said.items()}
    pairs = [(one.record.get("answerable") == 0, texts[one.question_id] == "unanswerable") for one in questions]
    hits, total = sum(map(all, pairs)), sum(map(sum, pairs))
    return {"F1 of unanswerable": 2 * hits / total if total else None}


def _hateful_figures(scorer: str, said: Texts, questions: Sequence[VqaQuestion], files: Files) -> dict[str, Any]:
    scores = [{1: 1.0, 0: 0.0, None: 0.5}[vqa_scores.hateful(said[one.question_id])] for one in questions]
    return {"AUROC of yes, neither, no": vqa_scores.auroc([one.record["label"] for one in questions], scores)}


def _nearest_figures(scorer: str, said: Texts, questions: Sequence[VqaQuestion], files: Files) -> dict[str, Any]:
    """Multiple choice by the choice that is nearest to a direct answer, where the user has a file of word vectors."""
    if files.vectors is None:
        return {}
    pairs = [(said.get(one.question_id, ""), one.record["choices"]) for one in questions]
    vectors = vqa_scores.read_vectors(files.vectors, [text for answer, own in pairs for text in (answer, *own)])
    picks = [vqa_scores.nearest_choice(text, own, vectors) for text, own in pairs]
    right = [pick == one.record["correct_choice_idx"] for pick, one in zip(picks, questions, strict=True)]
    return {"multiple choice by nearest choice": float(np.mean(right))}


# The benchmarks


@dataclass(frozen=True)
class Benchmark:
    """How one is answered, scored and handed in."""

    title: str
    read: Callable[[Files], QuestionSet]
    form: ResultForm
    gold: str
    """Field of a record that has the answer."""
    rules: Mapping[str, str]
    """What counts as right by scorer, the default first."""
    match: Match
    figures: Callable[[str, Texts, Sequence[VqaQuestion], Files], dict[str, Any]] = lambda *_: {}
    counts: Callable[[str, Record], bool] = lambda *_: True
    """Whether a record is one of those that a scorer counts."""
    is_ranked: bool = False
    """The likeliest of the choices is the answer; else it is generated."""
    missing_is_wrong: bool = False
    """With `--partial`; else questions without an answer do not count."""
    is_read: Callable[[str], bool] | None = None
    """Whether an answer is one of the two that there are."""

    def score(self, scorer: str, said: Texts, questions: Sequence[VqaQuestion]) -> Scores:
        """Scores by question_id of the questions that count; 0 without an answer."""
        counted = {one.question_id: one.record for one in questions if self.counts(scorer, one.record)}
        return {key: float(self.match(scorer, said[key], one)) if key in said else 0.0 for key, one in counted.items()}


def _by_people(scorers: Mapping[str, Callable[[str, Sequence[str]], float]]) -> Match:
    return lambda scorer, text, one: scorers[scorer](text, [answer["answer"] for answer in one["answers"]])


OTHERS = "mean over the answers of min(1, matches among the others / 3)"
NORMALISED = f"{OTHERS}; both sides normalised, unless all answers are the same"
VQA_RULES = {
    "official": NORMALISED,
    "minigpt4": f"{NORMALISED}, and in lower case",
    "lavis": f"{OTHERS}; the prediction normalised, of the answers the signs alone",
    "lmms": f"{OTHERS}; both sides normalised as EvalAI does",
}
BY_ID = ResultForm("list", "question_id", "answer")
BENCHMARKS = {
    "vqav2": Benchmark("VQAv2", vqa_data.read_vqa, BY_ID, "answers", VQA_RULES, _by_people(vqa_scores.VQA)),
    "okvqa": Benchmark("OK-VQA", vqa_data.read_vqa, BY_ID, "answers", VQA_RULES, _by_people(vqa_scores.VQA)),
    "aokvqa": Benchmark(
        "A-OKVQA MC",
        vqa_data.read_aokvqa,
        ResultForm("by id", "question_id", "multiple_choice"),
        "correct_choice_idx",
        {"official": "the text of the right choice"},
        lambda scorer, text, one: text == one["choices"][one["correct_choice_idx"]],
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
        lambda scorer, text, one: vqa_scores.three_of_all(text, one["direct_answers"]),
        _nearest_figures,
        counts=lambda scorer, one: scorer == "lavis" or not one["difficult_direct_answer"],
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
        lambda scorer, text, one: vqa_scores.gqa_matches(text, one["answer"], scorer),
        _gqa_figures,
        counts=lambda scorer, one: one.get("isBalanced", True),  # as all are in MiniGPT-4's list
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
        _by_people(vqa_scores.VIZWIZ),
        _vizwiz_figures,
    ),
    "iconqa": Benchmark(
        "IconQA",
        vqa_data.read_iconqa,
        ResultForm("list", "image_id", "answer"),
        "answer",
        {"official": "the text of the right choice"},
        lambda scorer, text, one: text == one["choices"][one["answer"]],
        is_ranked=True,
    ),
    "vsr": Benchmark(
        "VSR",
        vqa_data.read_vsr,
        BY_ID,
        "label",
        {"minigpt4": "`true` or `false` in whatever case, blanks count"},
        lambda scorer, text, one: text.lower() == ("true" if one["label"] else "false"),
        is_read=lambda text: text.lower() in ("true", "false"),
    ),
    "hateful_memes": Benchmark(
        "Hateful Memes",
        vqa_data.read_hateful_memes,
        ResultForm("list", "id", "answer"),
        "label",
        {"minigpt4": "`yes` or `no` in whatever case, alone"},
        lambda scorer, text, one: vqa_scores.hateful(text) == one["label"],
        _hateful_figures,
        is_read=lambda text: vqa_scores.hateful(text) is not None,
    ),
    "pope": Benchmark(
        "POPE",
        vqa_data.read_pope,
        ResultForm("lines", "question_id", "answer"),
        "label",
        {"official": "yes, unless the first sentence has the word No, no or not"},
        lambda scorer, text, one: vqa_scores.pope(text) == (one["label"] == hallucination.YES),
        is_read=lambda text: yes_no(text) is not None,
    ),
    "science_qa": Benchmark(
        "ScienceQA",
        vqa_data.read_science_qa,
        ResultForm("lines", "question_id", "text"),
        "answer",
        {"official": "the letter alone, in front as `B. `, or in exactly one `The answer is B.`"},
        lambda scorer, text, one: science_qa.choice_of(science_qa.find_letter(text), one) == one["answer"],
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
    benchmark: Benchmark, run: EvaluationRun, read: QuestionSet, images: Path, prompt: str
) -> tuple[dict[str, Any], list[dict[str, Texts]] | None]:
    """How was asked; and on rank 0 each checkpoint's answers, where choices are ranked by rule, `sum` or `mean`.

    Errors are those of `questions.ask`; every rank must call it.
    """
    from minigpt4.evaluation.generate import ask, setup_metadata  # loads torch, which scoring does not need

    ids = {str(one.question_id): one.question_id for one in read.questions}
    choices = {str(one.question_id): one.record["choices"] for one in read.questions} if benchmark.is_ranked else {}
    rules, said = ask(run, read.questions, images, prompt, choices)
    setup, found = setup_metadata(run.cfg, rules), []
    if choices:
        setup |= {"decoding": {"choices": "ranked by likelihood, each by itself"}, "batch_size": 1}
    for own in said or []:
        ways: dict[str, Texts] = {"generated": {ids[key]: answer.text for key, answer in own.items()}}
        if choices:
            losses = {key: json.loads(answer.text) for key, answer in own.items()}
            picks = {way: {key: vqa_scores.pick(one, way) for key, one in losses.items()} for way in get_args(Rank)}
            ways = {way: {ids[key]: choices[key][pick] for key, pick in own.items()} for way, own in picks.items()}
        found.append(ways)
    return setup, said and found
