"""A judge who sees the image: is the answer about it, and does it do what was asked?"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from minigpt4.evaluation.failures.answers import AskedAnswer
from minigpt4.evaluation.failures.rules import EMPTY, OFF_IMAGE, OFF_INSTRUCTION, Failure
from minigpt4.evaluation.judge import Judge, Question

log = logging.getLogger(__name__)

QUESTION = """Somebody was shown this image and was told: "{instruction}"
The answer was:
<answer>
{text}
</answer>
Judge two things and nothing else; style, length and repetition do not matter.
1. IMAGE: is the answer about this image? Small mistakes are fine. Say no if it is mostly about things that are not \
there.
2. INSTRUCTION: is the answer of the kind that was asked for? Say no for a refusal, a question, a caption of a few \
words where a detailed description was asked for, or prose where a poem was asked for.
Reply with exactly two lines, each with yes or no and a short reason:
IMAGE: yes or no - reason
INSTRUCTION: yes or no - reason"""
LINE = re.compile(r"^\W*(?:\d\W+)?(IMAGE|INSTRUCTION)\W+(yes|no)\b(?:[^\w\n]|_)*(.*)$", re.IGNORECASE | re.MULTILINE)
KIND_OF = {"IMAGE": OFF_IMAGE, "INSTRUCTION": OFF_INSTRUCTION}


def ask_judge(judge: Judge, answers: Sequence[AskedAnswer], at_once: int) -> tuple[list[AskedAnswer], int]:
    """The answers with what the judge finds, and how many replies could not be read, which find nothing.

    Empty answers are not judged. Raises RunError if the judge cannot be reached.
    """
    asked = [answer for answer in answers if all(failure.kind != EMPTY for failure in answer.failures)]
    questions = [
        Question(QUESTION.format(instruction=answer.instruction, text=answer.text), Path(answer.image))
        for answer in asked
    ]
    replies = dict(zip(map(id, asked), judge.ask_all(questions, at_once=at_once), strict=True))
    judged, unread = [], 0
    for answer in answers:
        reply = replies.get(id(answer))
        found = [] if reply is None else read_reply(reply)
        if found is None:
            if not unread:
                log.warning("A reply of the judge cannot be read: %.200r", reply)
            unread += 1
        judged.append(answer.and_failures(found or []))
    return judged, unread


def read_reply(reply: str) -> list[Failure] | None:
    """What a reply finds; None if it does not answer both questions."""
    said = {name.upper(): (word.lower(), reason.strip()) for name, word, reason in LINE.findall(reply)}
    if set(said) != set(KIND_OF):
        return None
    return [
        Failure(kind, f"the judge: {said[name][1] or 'no reason given'}")
        for name, kind in KIND_OF.items()
        if said[name][0] == "no"
    ]
