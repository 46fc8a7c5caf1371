"""Conversations in LLaVA's form, as the model takes them."""

from typing import Any

from minigpt4.common.errors import SampleError
from minigpt4.common.text import parse_json, require_readable

IMAGE_TAG = "<Img><ImageHere></Img> "
PLACEHOLDER = "<image>"
SEPARATOR = "\x1e"
"""Between the questions, and between the answers, of a sample: a control character that no text holds."""

_SPEAKERS = ("human", "gpt")


def conversation_fields(turns: Any) -> dict[str, str]:
    """`[{"from": "human", "value": "<image> ..."}, {"from": "gpt", "value": "..."}, ...]` -> conv_q, conv_a.

    The image comes before the first question, wherever `<image>` stands in it or whether it stands at all.
    A CSV holds the turns as JSON text. SampleError that names the turn, counted from 1, when they do not
    alternate from a human's question to an answer, or one is empty.
    """
    turns = _read(turns)
    texts = [_text(turn, number) for number, turn in enumerate(turns, start=1)]
    if not texts or len(texts) % 2:
        raise SampleError(f"a conversation needs an answer to each question, it has {len(texts)} turns")
    questions = [_question(text, number) for number, text in enumerate(texts[::2])]
    questions[0] = IMAGE_TAG + questions[0]
    return {"conv_q": SEPARATOR.join(questions), "conv_a": SEPARATOR.join(texts[1::2]), "connect_sym": SEPARATOR}


def _read(turns: Any) -> list[Any]:
    if isinstance(turns, str):
        try:
            turns = parse_json(turns)
        except ValueError as error:
            raise SampleError(f"the conversation is not JSON ({error})") from error
    if not isinstance(turns, list):
        raise SampleError("a conversation must be a list of turns")
    return turns


def _text(turn: Any, number: int) -> str:
    speaker = _SPEAKERS[(number - 1) % 2]
    if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
        raise SampleError(f'turn {number} must be {{"from": "{speaker}", "value": text}}')
    text = turn["value"]
    if not text.replace(PLACEHOLDER, "").strip():
        raise SampleError(f"turn {number} is empty")
    if SEPARATOR in text or "<ImageHere>" in text:
        raise SampleError(f"turn {number} holds {SEPARATOR!r} or <ImageHere>, which mean something to the model")
    return require_readable(text, f"turn {number}")


def _question(text: str, index: int) -> str:
    allowed = 0 if index else 1
    if text.count(PLACEHOLDER) > allowed:
        raise SampleError(f"turn {2 * index + 1}: a conversation has one image, {PLACEHOLDER} in the first question")
    return text.replace(PLACEHOLDER, "").strip()
