"""Conversations that outgrow the LLM's context: the oldest turns go, images stay."""

from bisect import bisect_left
from collections.abc import Callable

from minigpt4.common.errors import SampleError
from minigpt4.conversation.turns import Turns


def fit(conversation: Turns, length: Callable[[str], int], max_new_tokens: int, context: int) -> tuple[Turns, int]:
    """The conversation as the LLM can read it, and how many of its oldest turns were left out.

    Args:
        length: positions that a prompt takes, images included.
        context: positions that prompt and answer may take together.

    Raises SampleError if the last question does not fit by itself.
    """

    def needed(turns: int) -> int:
        return length(conversation.without_oldest(turns).get_prompt()) + max_new_tokens

    every = range(conversation.num_answered + 1)
    dropped = bisect_left(every, True, key=lambda turns: needed(turns) <= context)
    if dropped == len(every):
        raise SampleError(
            f"the question and its images take {needed(every[-1]) - max_new_tokens} positions and the answer may take "
            f"{max_new_tokens}, but this LLM reads {context} in all: ask a shorter question, show fewer images, or "
            "lower the maximum of new tokens"
        )
    return conversation.without_oldest(dropped), dropped
