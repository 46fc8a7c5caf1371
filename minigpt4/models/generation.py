"""Text from prompt embeddings with the counts of transformers 4.30, on which MiniGPT-4's published decoding ran.

There an output from embeddings starts with a bos token that counts for `min_length`, for the repetition penalty
and in the length of a beam. One beam goes through transformers' public `generate`, with bos as the first output
id and the processors that later versions changed passed explicitly; several beams go through beam_search.py,
for their rules changed. docs/design.md ("Generation") has the arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt4.common.errors import ConfigError
from minigpt4.models.beam_search import BeamSearch
from minigpt4.models.llm import compute_as_stored

TOP_K = 50
"""Candidates that sampling keeps: the default of transformers 4.30, which the published code never changed."""


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


class StopOnText(StoppingCriteria):
    """Ends a row, and that row alone, as soon as its own output contains one of the stop strings.

    Compares text, not ids, for a tokenizer can write `###` in more than one way.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        if not all(stop):
            raise ConfigError("stop: an empty string would end every answer at once; leave it out")
        self.stop = list(stop)
        self.tokenizer = tokenizer
        self.tail = 1 + max(len(text.encode()) for text in stop)  # a token holds at least one byte of text

    def __call__(self, input_ids: Tensor, scores: object, **kwargs) -> Tensor:
        first = max(1, input_ids.shape[1] - self.tail)
        texts = self.tokenizer.batch_decode(input_ids[:, first:].tolist())
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first stop string in it."""
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


@torch.no_grad()
def generate_ids(
    llm: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    embeds_BTD: Tensor,
    attention_mask_BT: Tensor,
    decoding: Decoding,
    stop: Sequence[str] = (),
) -> Tensor:
    """Output ids (B, 1 + L), L at most `max_new_tokens`: bos, the answer, its end token, then filling.

    `embeds_BTD` is padded on the left with mask 0; position ids follow the mask.
    """
    ids = llm.generation_config
    first = ids.bos_token_id if ids.bos_token_id is not None else ids.pad_token_id
    eos = end_tokens(llm)
    processors = _processors(decoding, eos, embeds_BTD.device)
    stopping = StoppingCriteriaList([StopOnText(stop, tokenizer)] if stop else [])
    if decoding.num_beams > 1:
        search = BeamSearch(
            decoding.num_beams,
            decoding.max_new_tokens,
            decoding.length_penalty,
            eos,
            processors,
            stopping,
            _warpers(decoding) if decoding.do_sample else None,
        )
        with compute_as_stored(llm):
            rows = [torch.tensor(row) for row in search.run(llm, embeds_BTD, attention_mask_BT, first)]
        return pad_sequence(rows, batch_first=True, padding_value=ids.pad_token_id).to(embeds_BTD.device)
    with compute_as_stored(llm):
        output = llm.generate(
            input_ids=torch.full((embeds_BTD.shape[0], 1), first, device=embeds_BTD.device),
            inputs_embeds=embeds_BTD,
            attention_mask=attention_mask_BT,
            generation_config=_generation_config(ids, decoding),
            logits_processor=processors,
            stopping_criteria=stopping,
        )
    return _fill_after_end(output, eos, ids.pad_token_id)


def _generation_config(ids: GenerationConfig, decoding: Decoding) -> GenerationConfig:
    settings = {
        "bos_token_id": ids.bos_token_id,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
        "do_sample": decoding.do_sample,
        "max_new_tokens": decoding.max_new_tokens,
    }
    if decoding.do_sample:
        settings |= {"temperature": float(decoding.temperature), "top_p": float(decoding.top_p), "top_k": TOP_K}
    return GenerationConfig(**settings)


def _processors(decoding: Decoding, eos: list[int], device: torch.device) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if eos and decoding.min_length > 0:
        processors.append(MinLengthLogitsProcessor(decoding.min_length, eos, device=str(device)))
    return processors


def _warpers(decoding: Decoding) -> LogitsProcessorList:
    """What sampling does to the scores of several beams; `generate` does it for one."""
    keep = {"min_tokens_to_keep": 2}  # as in transformers 4.30
    return LogitsProcessorList(
        [
            TemperatureLogitsWarper(float(decoding.temperature)),
            TopKLogitsWarper(TOP_K, **keep),
            TopPLogitsWarper(float(decoding.top_p), **keep),
        ]
    )


def _fill_after_end(ids_BL: Tensor, eos: list[int], fill: int) -> Tensor:
    """Everything after a row's first end token becomes `fill`; columns that are filling in every row go."""
    if not eos:
        return ids_BL
    is_end = torch.isin(ids_BL, torch.tensor(eos, device=ids_BL.device))
    is_end[:, 0] = False
    ended_before = (is_end.cumsum(dim=1) - is_end.long()) > 0
    longest = int((~ended_before).sum(dim=1).max())
    return ids_BL.masked_fill(ended_before, fill)[:, :longest]


def end_tokens(llm: nn.Module) -> list[int]:
    """Ids that end an answer of this LLM."""
    return _as_list(llm.generation_config.eos_token_id)


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]
