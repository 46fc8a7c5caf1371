"""How an answer is searched for, and what came of it; plain data, without torch."""

from dataclasses import dataclass

from minigpt4.common.errors import ConfigError


@dataclass(frozen=True)
class Decoding:
    """How an answer is searched for; the defaults are those of the published `generate`."""

    num_beams: int = 1
    max_new_tokens: int = 20
    min_length: int = 1
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    temperature: float = 1.0
    do_sample: bool = False

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.do_sample and self.temperature <= 0:
            raise ConfigError("temperature: must be above 0; for the most likely answer set do_sample to False")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p} must be in (0, 1]")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty: {self.repetition_penalty} must be above 0")


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    ended: bool | None
    """True: an end token or a stop string came; False: the token limit did; None: nobody wrote it down."""
