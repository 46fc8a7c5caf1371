"""Conversations that outgrow the LLM's context: the oldest turns go, images stay."""

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
    dropped = 0
    while (needed := length(conversation.get_prompt())) + max_new_tokens > context:
        shorter = conversation.without_oldest_turn()
        if shorter is None:
            raise SampleError(
                f"the question and its images take {needed} positions and the answer may take {max_new_tokens}, but "
                f"this LLM reads {context} in all: ask a shorter question, or lower the maximum of new tokens"
            )
        conversation, dropped = shorter, dropped + 1
    return conversation, dropped
