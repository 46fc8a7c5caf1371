"""From the page's sliders to a decoding."""

from dataclasses import dataclass

from minigpt4.common.errors import SampleError
from minigpt4.conversation.chat import PUBLISHED_CHAT
from minigpt4.conversation.decoding import Decoding
from minigpt4.serving.limits import Limits


@dataclass(frozen=True)
class Slider:
    """A number that a visitor chooses."""

    label: str
    least: float
    most: float
    step: float
    start: float
    info: str = ""


def sliders(limits: Limits, context: int) -> list[Slider]:
    """The page's sliders, in the order of `decoding`'s arguments; they start as the published demo does.

    `context`: positions that the LLM reads; an answer may take half of them.
    """
    tokens = max(1, min(limits.new_tokens, context // 2))
    start = PUBLISHED_CHAT
    return [
        Slider(
            "Beams",
            1,
            limits.beams,
            1,
            start.num_beams,
            "More than one: the answer appears at once, at its end.",
        ),
        Slider("Temperature", 0.0, 2.0, 0.1, start.temperature, "0: the most likely answer, always the same."),
        Slider("Top-p", 0.05, 1.0, 0.05, start.top_p, "Less: only the likelier words are chosen from."),
        Slider("Maximum of tokens", 1, tokens, 1, min(start.max_new_tokens, tokens), "The longest answer."),
        Slider("Repetition penalty", 1.0, 2.0, 0.05, start.repetition_penalty, "Above 1: words are not said so often."),
    ]


def decoding(
    limits: Limits, beams: float, temperature: float, top_p: float, tokens: float, repetition_penalty: float
) -> Decoding:
    """How to answer; a temperature of 0 is the most likely answer.

    Raises:
        SampleError: a value is out of bounds, which a page's sliders do not allow but a request can hold.
    """
    if not (1 <= beams <= limits.beams and 1 <= tokens <= limits.new_tokens):
        raise SampleError(f"at most {limits.beams} beams and {limits.new_tokens} tokens")
    samples = temperature > 0
    return Decoding(
        num_beams=int(beams),
        max_new_tokens=int(tokens),
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        temperature=temperature if samples else 1.0,
        do_sample=samples,
    )
