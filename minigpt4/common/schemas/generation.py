"""Schema of the YAML section `run.generation:`, how an evaluation decodes its captions."""

from dataclasses import dataclass

from minigpt4.common.schemas.checks import at_least, require


@dataclass
class GenerationSettings:
    """Decoding, prompt and end of captions. The defaults decode greedily: the same captions in every run."""

    num_beams: int = 1
    """Width of the beam search; 1: no search."""

    do_sample: bool = False
    """Draw tokens at random; False takes the likeliest."""

    temperature: float = 1.0
    """Divides the logits before tokens are drawn; read with `do_sample` only."""

    top_p: float = 0.9
    """Draw from the likeliest tokens that together have this probability; read with `do_sample` only."""

    max_new_tokens: int = 160
    """Longest caption, tokens: what `max_txt_len` of the published recipes allows in training."""

    min_length: int = 1
    """Tokens before a caption may end, bos counted."""

    repetition_penalty: float = 1.0
    """Divides the scores of tokens that stand in the caption already; 1: none."""

    length_penalty: float = 1.0
    """Exponent of the length that a beam's score is divided by; above 1 favours longer captions. Read with
    `num_beams` above 1 only."""

    prompt: str | None = None
    """Instruction with one `<ImageHere>`, put into `model.prompt_template`; null: the first of `model.prompt_path`,
    or the image alone if there is no such file."""

    stop: list[str] | None = None
    """Strings that end a caption; null: `model.end_sym`."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_beams", "max_new_tokens")
        at_least(self, 0, "min_length")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        for key in ("temperature", "repetition_penalty"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        require(all(self.stop or []), "stop", self.stop, "a list of strings of which none is empty")
