"""Text from prompt embeddings with the counts of transformers 4.30, on which MiniGPT-4's published decoding ran.

There an output from embeddings starts with a bos token that counts for `min_length`, for the repetition penalty
and in the length of a beam. One beam goes through row_decoder.py, several through beam_search.py.
docs/design.md ("Generation") has the arithmetic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.decoding import Answer, Decoding
from minigpt4.models.beam_search import BeamSearch
from minigpt4.models.row_decoder import DecodedRow, RowDecoder, penalties, tail_length, warpers

__all__ = [
    "Answer",
    "Decoding",
    "StopOnText",
    "check_stop",
    "cut_at_stop",
    "end_tokens",
    "generate_ids",
    "first_token",
]


def check_stop(stop: Sequence[str]) -> list[str]:
    """The stop strings; ConfigError for an empty one."""
    if not all(stop):
        raise ConfigError("stop: an empty string would end every answer at once; leave it out")
    return list(stop)


class StopOnText(StoppingCriteria):
    """Ends a row, and that row alone, as soon as its own output contains one of the stop strings.

    Compares text, not ids, for a tokenizer can write `###` in more than one way.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.stop = check_stop(stop)
        self.tokenizer = tokenizer
        self.tail = tail_length(stop)

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
    stop = check_stop(stop)
    if decoding.num_beams > 1:
        search = beam_search(llm, tokenizer, decoding, stop)
        rows = search.run(llm, embeds_BTD, attention_mask_BT, first_token(llm))
    else:
        decoder = RowDecoder(llm, tokenizer, end_tokens(llm))
        decoded = [DecodedRow([first_token(llm)], decoding, stop) for _ in embeds_BTD]
        decoder.add(decoded, embeds_BTD, attention_mask_BT)
        while decoder.rows:
            decoder.step()
        rows = [row.ids for row in decoded]
    fill = llm.generation_config.pad_token_id
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill).to(embeds_BTD.device)


def beam_search(
    llm: nn.Module, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, stop: Sequence[str] = ()
) -> BeamSearch:
    """The search of several beams as `decoding` has it."""
    ends, device = end_tokens(llm), llm.get_input_embeddings().weight.device
    return BeamSearch(
        decoding.num_beams,
        decoding.max_new_tokens,
        decoding.length_penalty,
        ends,
        penalties(decoding, ends, device),
        StoppingCriteriaList([StopOnText(stop, tokenizer)] if stop else []),
        warpers(decoding, min_tokens_to_keep=2) if decoding.do_sample else None,
    )


def first_token(llm: nn.Module) -> int:
    """What every output starts with: bos, or padding for an LLM without bos."""
    ids = llm.generation_config
    return ids.bos_token_id if ids.bos_token_id is not None else ids.pad_token_id


def end_tokens(llm: nn.Module) -> list[int]:
    """Ids that end an answer of this LLM."""
    return _as_list(llm.generation_config.eos_token_id)


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]
