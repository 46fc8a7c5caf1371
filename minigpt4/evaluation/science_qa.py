"""ScienceQA: records in LLaVA's form, the letter in an answer, accuracy by subject, ensembles with GPT-4.

Sources: Lu et al., Learn to Explain, 2022; Liu et al., Visual Instruction Tuning, 2023, with the files, the order of
extraction and the oddities of haotian-liu/LLaVA.
"""

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, MaxLen, MinLen

from minigpt4.common.binding import checked, fields_of
from minigpt4.common.errors import ConfigError, SampleError, first_few, hint, require_same_ids
from minigpt4.conversation.llava import IMAGE_TOKEN
from minigpt4.evaluation.bootstrap import wilson
from minigpt4.evaluation.judge import Judge, Question
from minigpt4.evaluation.questions import Text, VisualQuestion, read_json
from minigpt4.evaluation.report import Table, with_intervals
from minigpt4.evaluation.yes_no import without_thought

LETTERS = "ABCDE"
FAILED = "FAILED"
NO_ANSWER = "GPT-4 NO-ANS (RANDOM)"
INPUTS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUTS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")
FORMATS = tuple(f"{question}-{answer}" for question in INPUTS for answer in OUTPUTS)
"""What stands in question and answer, in order: Question, Context, choices (M), Lecture, Explanation, Answer."""
PROBLEM = fields_of(
    choices=Annotated[list[str], MinLen(2), MaxLen(len(LETTERS))],
    answer=Annotated[int, Ge(0)],
    image=str | None,
    **dict.fromkeys(("question", "subject", "grade", "topic"), Text),
    **dict.fromkeys(("hint", "lecture", "solution"), str),
)
"""What `problems.json` holds of each."""
SPLITS = dict[str, list[str | int]]
OUTPUTS_FILE = fields_of(outputs=dict[str, str])
TURNS = Annotated[list[fields_of(value=str)], MinLen(1)]
RECORDS = Annotated[list[fields_of(id=str, image=NotRequired[str | None], conversations=TURNS)], MinLen(1)]
"""What `convert` writes, and LLaVA's files hold."""
SWAPPED = {"AL": "AE", "AE": "AL"}
"""The published AL has the explanation, AE the lecture."""
LETTER_ALONE = "Answer with the option's letter from the given choices directly."
"""What 1.5 adds to a question."""
ANSWER = re.compile("The answer is ([A-Z]).")
REQUERY = """{question}

One person answered:
{ours}

Another person answered:
{other}

Decide on your own final answer, from the question and the two answers. Give a short reason, and end with the sentence \
"The answer is X.", where X is the letter of an option."""
GROUPS: dict[str, tuple[str, str, Collection[Any]]] = {
    "NAT": ("acc_natural", "subject", ["natural science"]),
    "SOC": ("acc_social", "subject", ["social science"]),
    "LAN": ("acc_language", "subject", ["language science"]),
    "TXT": ("acc_has_text", "has_text", [True]),
    "IMG": ("acc_has_image", "has_image", [True]),
    "NO": ("acc_no_context", "no_context", [True]),
    "G1-6": ("acc_grade_1_6", "grade", [f"grade{number}" for number in range(1, 7)]),
    "G7-12": ("acc_grade_7_12", "grade", [f"grade{number}" for number in range(7, 13)]),
    "Avg": ("acc_average", "all", [True]),
}
"""By column: name in the ScienceQA tool, what is looked at, and its values. TXT and IMG overlap."""
PUBLISHED = {
    "GPT-4, text alone, 2 examples": "84.06 73.45 87.36 81.87 70.75 90.73 84.69 79.10 82.69",
    "LLaVA 13B": "90.36 95.95 88.00 89.49 88.00 90.66 90.93 90.90 90.92",
    "LLaVA 13B + GPT-4 complement": "90.36 95.50 88.55 89.05 87.80 91.08 92.22 88.73 90.97",
    "LLaVA 13B + GPT-4 judge": "91.56 96.74 91.09 90.62 88.99 93.52 92.73 92.16 92.53",
    "LLaVA 1.5 7B, zero-shot": "- - - - 66.8 - - - -",
    "LLaVA 1.5 13B, zero-shot": "- - - - 71.6 - - - -",
}

Problems = Mapping[str, Mapping[str, Any]]
"""By id, in the order of the split."""


def read_problems(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    """The problems of a split, from `problems.json` and `pid_splits.json` of a folder.

    ConfigError for a split that is not there, SampleError that names the id of a bad problem.
    """
    file, listed = folder / "problems.json", folder / "pid_splits.json"
    problems, splits = checked(dict, read_json(file), file), checked(SPLITS, read_json(listed), listed)
    if not splits.get(split):
        raise ConfigError(f"--split: {listed} has no ids of {split!r}; {hint(split, splits)}")
    found = {}
    for key in map(str, splits[split]):
        where = f"{file}, problem {key}"
        if key not in problems:
            raise SampleError(f"{where}: is not there, but in the split {split!r}")
        one = checked(PROBLEM, problems[key], where)
        if one["answer"] >= len(one["choices"]):
            raise SampleError(f"{where}: the field 'answer' must be the number of a choice, from 0")
        found[key] = one
    return found


# Records in LLaVA's form


def question_and_answer(problem: Mapping[str, Any], prompt_format: str) -> tuple[str, str]:
    """Both texts of a problem in one of `FORMATS`, without `<image>`."""
    asked, _, answered = prompt_format.partition("-")
    choices = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, problem["choices"], strict=False))
    texts = {"L": problem["lecture"].replace("\\n", "\n"), "E": problem["solution"].replace("\\n", "\n")}
    lines = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {problem['hint'].strip() or 'N/A'}",
        "M": f"Options: {choices}",
    }
    lines |= {parts: f"BECAUSE: {' '.join(texts[part] for part in parts)}" for parts in ("L", "E", "LE", "EL")}
    question = "\n".join(lines[part] for part in re.findall("[QCM]|LE?|E", asked))
    letter = LETTERS[problem["answer"]]
    if answered == "LEPA":
        named = (("LECTURE", texts["L"]), ("SOLUTION", texts["E"]))
        answer = "".join(f"{name}: {text}\n" for name, text in named if text.strip()) + f"###\nANSWER: {letter}."
    elif answered == "A":
        answer = f"The answer is {letter}."
    elif answered.startswith("A"):
        answer = f"Answer: The answer is {letter}. {lines[SWAPPED.get(answered, answered)[1:]]}"
    else:
        answer = f"Answer: {' '.join(texts[part] for part in answered[:-1])} The answer is {letter}."
    return _tidy(question, "Question: "), _tidy(answer, "Answer: ")


def _tidy(text: str, head: str) -> str:
    """Double blanks are squeezed once, an empty reason goes; a head in front goes, and then wherever else it stands."""
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace(head, "") if text.startswith(head) else text


def records(problems: Problems, prompt_format: str, *, as_lines: bool = False) -> list[dict[str, Any]]:
    """Training records of LLaVA; `as_lines`: the other published form, `instruction` and `output`.

    ConfigError for an unknown format.
    """
    if prompt_format not in FORMATS:
        raise ConfigError(
            f"--prompt-format: {prompt_format!r} must be one of {', '.join(INPUTS)}, then - and one of "
            f"{', '.join(OUTPUTS)}"
        )
    found = []
    for key, problem in problems.items():
        question, answer = question_and_answer(problem, prompt_format)
        image = {} if problem["image"] is None else {"image": f"{key}/{problem['image']}"}
        question += f"\n{IMAGE_TOKEN}" if image else ""
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        said = {"instruction": question, "output": answer} if as_lines else {"conversations": turns}
        found.append({"id": key, **image, **said})
    return found


def read_questions(path: Path, *, letter_alone: bool = False) -> list[VisualQuestion]:
    """The first turns of records as questions without `<image>`; `letter_alone` adds 1.5's request for the letter."""
    questions: dict[str, VisualQuestion] = {}
    for record in checked(RECORDS, read_json(path), path):
        key, text = record["id"], record["conversations"][0]["value"].replace(IMAGE_TOKEN, "").strip()
        if key in questions:
            raise SampleError(f"{path}: the id {key} comes twice")
        asked = f"{text}\n{LETTER_ALONE}" if letter_alone else text
        questions[key] = VisualQuestion(key, record.get("image") or None, asked)
    return list(questions.values())


# Scores


def find_letter(text: str) -> str:
    """The letter in an answer, in the published order: the letter alone; `B. ` in front; exactly one `The answer is B`
    with a sign behind it; else `FAILED`."""
    alone = re.match(rf"([{LETTERS}])(\Z|\. )", text)
    return alone[1] if alone else find_sentence(text)


def find_sentence(text: str) -> str:
    """The letter of exactly one `The answer is B.`, or `FAILED`: all that the ensembles look at."""
    found = ANSWER.findall(text)
    return found[0] if len(found) == 1 else FAILED


def choice_of(letter: str, problem: Mapping[str, Any]) -> int:
    """The number of the choice, -1 for none."""
    return LETTERS[: len(problem["choices"])].find(letter) if len(letter) == 1 else -1


@dataclass
class Outcome:
    """Choices by id: what tables are made of."""

    name: str
    results: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """As the published scripts print them."""
    analysis: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"correct": [], "incorrect": []})
    """The published output file."""

    def result(self, problems: Problems) -> dict[str, Any]:
        """The published result file."""
        correct = sum(choice == problems[key]["answer"] for key, choice in self.results.items())
        acc = correct / len(self.results) * 100
        counts = {"acc": acc, "correct": correct, "count": len(self.results)}
        return {**counts, "results": self.results, "outputs": self.outputs}


def score(name: str, problems: Problems, answers: Mapping[str, Mapping[str, Any]]) -> Outcome:
    """Accuracy of answers by question_id; a missing one is wrong."""
    outcome = Outcome(name)
    for key, problem in problems.items():
        own = answers.get(key, {"text": FAILED})
        letter, prompt = find_letter(own["text"]), str(own.get("prompt", "Unknown"))
        outcome.results[key], outcome.outputs[key] = choice_of(letter, problem), own["text"]
        is_right = outcome.results[key] == problem["answer"]
        analysis = {
            "question_id": key,
            "parsed_ans": letter,
            "ground_truth": LETTERS[problem["answer"]],
            "question": prompt,
            "pred": own["text"],
            "is_multimodal": IMAGE_TOKEN in prompt,  # what the published IMG accuracy goes by
        }
        outcome.analysis["correct" if is_right else "incorrect"].append(analysis)
    right, wrong = (outcome.analysis[side] for side in ("correct", "incorrect"))
    (line,) = _lines([[True]] * len(right) + [[False]] * len(wrong), "Correct")
    shown = [sum(one["is_multimodal"] for one in side) for side in (right, wrong)]
    outcome.lines = [f"{line}, IMG-Accuracy: {percent(shown[0], sum(shown))}%"]
    return outcome


def percent(count: int, of: int) -> str:
    """With two places; `-` of nothing."""
    return f"{count / of * 100:.2f}" if of else "-"


def _lines(rows: Sequence[Sequence[bool]], *names: str) -> list[str]:
    """The published line of each column of `rows`, one a question."""
    lines = []
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        what = "Percentage" if name == NO_ANSWER else "Accuracy"
        lines.append(f"Total: {len(rows)}, {name}: {sum(column)}, {what}: {percent(sum(column), len(rows))}%")
    return lines


def by_group(problems: Problems, results: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Right ones and all of each group of the ScienceQA tool, by its names; topics that are there, too."""
    groups = {name: (key, values) for name, key, values in GROUPS.values()}
    groups |= {f"acc_{one['topic']}": ("topic", [one["topic"]]) for one in problems.values()}
    counts = {name: [0, 0] for name in groups}
    for i, choice in results.items():
        has_text, has_image = bool(problems[i]["hint"]), bool(problems[i]["image"])
        facts = {"has_text": has_text, "has_image": has_image, "no_context": not (has_text or has_image), "all": True}
        for name, (key, values) in groups.items():
            if {**problems[i], **facts}[key] in values:
                counts[name][0] += choice == problems[i]["answer"]
                counts[name][1] += 1
    return {name: (right, of) for name, (right, of) in counts.items()}


def table(problems: Problems, outcomes: Sequence[Outcome]) -> Table:
    """Accuracies in percent with 95% Wilson intervals, and the published ones of the test split below."""
    rows = []
    for own in outcomes:
        counts = by_group(problems, own.results)
        pairs = [counts[name] for name, _, _ in GROUPS.values()]
        ends = [[f"{100 * end:.2f}" for end in wilson(*pair)] if pair[1] else None for pair in pairs]
        rows += with_intervals(own.name, [percent(*pair) for pair in pairs], ends)
    rows += [[f"published: {name}", *cells.split()] for name, cells in PUBLISHED.items()]
    return Table(["accuracy, %", *GROUPS], rows)


# Ensembles with GPT-4


def read_outputs(path: Path) -> dict[str, str]:
    """GPT-4's answers by id, from a result file {"outputs": {"3": "The answer is B."}}."""
    return checked(OUTPUTS_FILE, read_json(path), path)["outputs"]


def _choice(draw: random.Random, text: str, problem: Mapping[str, Any]) -> tuple[int, bool]:
    """The choice in an answer, drawn where it has none, and whether it has a letter, of whatever choice."""
    letter = find_sentence(text)
    choice = choice_of(letter, problem)
    return (draw.choice(range(len(problem["choices"]))) if choice < 0 else choice), letter != FAILED


def complement(problems: Problems, ours: Mapping[str, str], gpt4: Mapping[str, str], seed: int = 0) -> Outcome:
    """GPT-4's choice, ours where GPT-4 has none. Questions that one of both lacks are left out, as published."""
    outcome, draw, rows = Outcome("+ GPT-4 complement"), random.Random(seed), []
    for key, problem in problems.items():
        if key in ours and key in gpt4:
            mine, _ = _choice(draw, ours[key], problem)  # the published order of draws
            other, has_answer = _choice(draw, gpt4[key], problem)
            taken, right = other if has_answer else mine, problem["answer"]
            outcome.results[key] = taken
            rows.append((taken == right, right in (taken, mine), not has_answer))
    if not rows:
        raise SampleError("no question of the split has both answers")
    outcome.lines = _lines(rows, "Correct", "Correct (upper)", NO_ANSWER)
    return outcome


def judged(
    problems: Problems, ours: Mapping[str, str], gpt4: Mapping[str, str], final: Mapping[str, str], seed: int = 0
) -> Outcome:
    """GPT-4's final choice, asked again with both answers; ours where it gave none. SampleError for missing answers."""
    for name, own in (("our answers", ours), ("GPT-4's answers", gpt4)):
        require_same_ids(problems, [key for key in own if key in problems], f"{name}: ")
    outcome, draw, rows = Outcome("+ GPT-4 judge"), random.Random(seed), []
    for key, problem in problems.items():
        mine, _ = _choice(draw, ours[key], problem)
        other, has_answer = _choice(draw, gpt4[key], problem)
        last, is_final = _choice(draw, final.get(key, ""), problem)
        taken, both, right = last if is_final else mine, other if has_answer else mine, problem["answer"]
        outcome.results[key] = taken
        own = (mine == right, other == right, not has_answer, both == right, taken == right, right in (mine, other))
        rows.append(own)
    names = ("Our-Correct", "GPT-4-Correct", NO_ANSWER, "GPT-4-OursVisual-Correct", "Requery-Correct", "Correct upper")
    outcome.lines = _lines(rows, *names)
    return outcome


def requery(judge: Judge, problems: Problems, ours: Mapping[str, str], gpt4: Mapping[str, str]) -> dict[str, str]:
    """GPT-4's final answers by id where both differ; the words are our own."""
    asked = {}
    for key, problem in problems.items():
        mine, other = ours.get(key, ""), gpt4.get(key, "")
        if find_sentence(mine) != find_sentence(other):
            question, _ = question_and_answer(problem, "QCM-A")
            asked[key] = Question(REQUERY.format(question=question, ours=mine, other=other))
    replies = map(without_thought, judge.ask_all(list(asked.values())))
    return dict(zip(asked, replies, strict=True))


def missing_note(name: str, problems: Problems, answers: Mapping[str, Any]) -> str:
    """How many problems have no answer, and how many answers are of other splits."""
    missing = [key for key in problems if key not in answers]
    extra = sum(key not in problems for key in answers)
    lacking = f"{len(missing)} of {len(problems)} have no answer and are wrong (ids {first_few(missing)})"
    note = f"{name}: {lacking if missing else f'all {len(problems)} have an answer'}"
    return f"{note}; {extra} answers are not of this split" if extra else note
