"""From what the LLM generated to the answer that a person reads; pure functions on text."""


def clean_generated(text: str) -> str:
    """The answer in decoded text of `model.generate`.

    What follows `</s>` is cut off, `<s>` is removed, of a prompt that was repeated only what follows the
    last `[/INST]` stays, and blanks at both ends go.
    """
    return _after_last(_before_first(text, "</s>").replace("<s>", ""), "[/INST]").strip()


def clean_answer(text: str, end: str = "###", start: str = "Assistant:") -> str:
    """The assistant's turn in decoded text of a chat.

    What follows the first `end` is cut off, of a prompt that was repeated only what follows the last
    `start` stays, and blanks at both ends go. An empty mark cuts nothing. A conversation's marks are its
    `answer_end` and `answer_start`; the defaults are those of Vicuna v0.
    """
    return _after_last(_before_first(text, end), start).strip()


def _before_first(text: str, mark: str) -> str:
    return text.split(mark, 1)[0] if mark else text


def _after_last(text: str, mark: str) -> str:
    return text.rsplit(mark, 1)[-1] if mark else text
