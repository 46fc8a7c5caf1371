"""How a request wants to be answered."""

from minigpt4.conversation.chat import PUBLISHED_CHAT
from minigpt4.conversation.decoding import Decoding
from minigpt4.serving.api.errors import wrong
from minigpt4.serving.api.limits import ApiLimits
from minigpt4.serving.api.schema import ChatRequest

COLD = 0.01
"""Temperatures below are taken for 0: dividing by them gains nothing but numbers that overflow."""


def read_decoding(request: ChatRequest, limits: ApiLimits) -> Decoding:
    """What the request says, and that of the published chat where it says nothing; ApiError 400 beyond a limit."""
    _check(
        "max_completion_tokens" if request.max_completion_tokens else "max_tokens",
        request.max_new_tokens,
        limits.new_tokens,
    )
    _check("num_beams", request.num_beams, limits.beams)
    _check("n", request.n, limits.answers)
    for number, stop in enumerate(request.stop or ()):
        if len(stop) > limits.stop_chars:
            raise wrong(f"stop[{number}]: longer than {limits.stop_chars} characters", f"stop[{number}]")
    default = PUBLISHED_CHAT
    temperature = default.temperature if request.temperature is None else request.temperature
    if request.seed is not None and (request.num_beams or 1) > 1 and temperature >= COLD:
        raise wrong("seed: has no effect on sampling with several beams; leave one of them out", "seed")
    return Decoding(
        num_beams=request.num_beams or default.num_beams,
        max_new_tokens=request.max_new_tokens or min(default.max_new_tokens, limits.new_tokens),
        top_p=request.top_p or default.top_p,
        repetition_penalty=request.repetition_penalty or default.repetition_penalty,
        temperature=temperature if temperature >= COLD else 1.0,
        do_sample=temperature >= COLD,
    )


def _check(field: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise wrong(f"{field}: {value} is more than this server's limit, {limit}", field)
