"""Beam search by the rules of transformers 4.30, which later versions changed.

A hypothesis scores its summed log-probabilities / length ** length_penalty; the length counts bos and the answer
without its end token, also where it is cut at the limit; where the LLM's `generation_config.beams_count_bos` is False,
the answer with its end token, as in 4.37. A row is done when it has K hypotheses and the best candidate
of this step, ended or not, divided by the length it would have, is no better than the worst of them. Unlike the
library's loop, this one runs the prompt once a row, not once a beam, and drops rows that are done.
Shapes: B rows still searched, K beams, N = B * K, C candidates a row, L ids so far (bos first), V vocabulary, T prompt
positions, D channels of the LLM.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.conversation.decoding import Decoding
from minigpt4.models.batch_decoder import (
    NOT_FINITE,
    STEADY,
    FixedBatch,
    KVCache,
    next_logits,
    penalties,
    warpers,
)
from minigpt4.models.cuda_graph import CudaGraphs
from minigpt4.models.llm import end_tokens, first_token


class BeamSearch:
    """Searches with `decoding.num_beams` beams; with `do_sample` candidates are drawn, else the likeliest are taken.

    Args:
        llm: a causal LM of transformers.
        stopping: further ends of a hypothesis, each of which counts as an end token does.
        graphs: as of `BatchDecoder`.
    """

    def __init__(
        self,
        llm: nn.Module,
        decoding: Decoding,
        stopping: Iterable[StoppingCriteria] = (),
        graphs: CudaGraphs | None = None,
    ) -> None:
        self._graphs = graphs
        self.llm, self.decoding, self.num_beams = llm, decoding, decoding.num_beams
        self._uncounted = 0 if getattr(llm.generation_config, "beams_count_bos", True) else 1
        self.end_ids, self.stopping = end_tokens(llm), StoppingCriteriaList(stopping)
        self.processors = penalties(decoding, self.end_ids, llm.get_input_embeddings().weight.device)
        self.warpers = warpers(decoding, min_tokens_to_keep=2) if decoding.do_sample else None

    @torch.no_grad()
    def steps(self, embeds_BTD: Tensor, mask_BT: Tensor) -> Iterator[list[list[int]] | None]:
        """None after each token, so that a caller can do other things, or give up; at last the best hypotheses.

        A hypothesis is bos, the answer, and its end token if it ended by itself. `embeds_BTD` is padded on the left
        with mask 0.
        """
        pools = [_Pool(self.num_beams, self.decoding.length_penalty) for _ in range(len(embeds_BTD))]
        open_rows = list(range(len(pools)))
        beams = _Beams(self.llm, embeds_BTD, mask_BT, self.num_beams, self._graphs)
        if self.warpers is None:  # let only the first beam of each row go on, for all of them are still the same
            beams.totals_N.view(-1, self.num_beams)[:, 1:] = -inf
        for step in range(self.decoding.max_new_tokens):
            if step:
                beams.forward()
            candidates = self._candidates(beams)
            chosen = {row: self._advance(pools[row], own) for row, own in zip(open_rows, candidates, strict=True)}
            open_rows = [row for row in open_rows if chosen[row]]
            if not open_rows:
                break
            beams.select([candidate for row in open_rows for candidate in chosen[row]])
            yield None
        for row, own in zip(open_rows, beams.hypotheses(), strict=False):
            for ids, total in own:
                pools[row].add(ids, total, length=len(ids) - self._uncounted)
        yield [pool.best() for pool in pools]

    def run(self, embeds_BTD: Tensor, mask_BT: Tensor) -> list[list[int]]:
        *_, best = self.steps(embeds_BTD, mask_BT)
        return best

    def _candidates(self, beams: "_Beams") -> list[list["_Candidate"]]:
        """The next C candidates of each row, best first: enough for K beams where as many end tokens come first."""
        totals_NV = self.processors(beams.ids_NL, beams.logits_NV.log_softmax(dim=-1)) + beams.totals_N[:, None]
        if self.warpers is not None:
            totals_NV = self.warpers(beams.ids_NL, totals_NV)
        vocabulary = totals_NV.shape[1]
        totals_BF = totals_NV.unflatten(0, (-1, self.num_beams)).flatten(1)
        count = min(max(2, 1 + len(self.end_ids)) * self.num_beams, totals_BF.shape[1])
        chosen_BC = self._choose(totals_BF, count)
        totals_BC = totals_BF.gather(1, chosen_BC)
        row_start_B1 = self.num_beams * torch.arange(len(totals_BF), device=chosen_BC.device)[:, None]
        parents_BC, tokens_BC = row_start_B1 + chosen_BC // vocabulary, chosen_BC % vocabulary
        ids = torch.cat([beams.ids_NL[parents_BC.flatten()], tokens_BC.flatten()[:, None]], dim=1)
        ended = torch.isin(ids[:, -1], ids.new_tensor(self.end_ids)) | self.stopping(ids, None)
        columns = (totals_BC.flatten(), parents_BC.flatten(), ended)
        flat = [_Candidate(*entry) for entry in zip(*(c.tolist() for c in columns), ids.tolist(), strict=True)]
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _choose(self, totals_BF: Tensor, count: int) -> Tensor:
        """Indices (B, count), highest total first; drawn without replacement if the search samples."""
        if self.warpers is None:
            return totals_BF.topk(count).indices
        gumbel_BF = -torch.empty_like(totals_BF).exponential_().log()  # the top of total + noise is such a draw
        drawn_BC = (totals_BF + gumbel_BF).topk(count).indices
        return drawn_BC.gather(1, totals_BF.gather(1, drawn_BC).argsort(dim=1, descending=True))

    def _advance(self, pool: "_Pool", candidates: list["_Candidate"]) -> list["_Candidate"]:
        """Put ended candidates into the pool; the K that go on, or none if the row is done."""
        for candidate in candidates[: self.num_beams]:
            if candidate.ended and candidate.total > -inf:
                pool.add(candidate.ids, candidate.total, length=len(candidate.ids) - 1)
        going_on = [c for c in candidates if not c.ended and c.total > -inf][: self.num_beams]
        best = candidates[0]
        if not going_on or pool.is_settled(best.total, length=len(best.ids) - self._uncounted):
            return []
        missing = self.num_beams - len(going_on)
        return going_on + [_Candidate(-inf, going_on[0].parent, False, going_on[0].ids)] * missing


@dataclass(frozen=True)
class _Candidate:
    total: float
    """Summed log-probabilities, after processors and warpers."""
    parent: int
    """Index of the beam that it continues, in N."""
    ended: bool
    ids: list[int]


@dataclass
class _Pool:
    """The best hypotheses of one row, best first."""

    size: int
    length_penalty: float
    entries: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, ids: list[int], total: float, length: int) -> None:
        self.entries.append((total / length**self.length_penalty, ids))
        self.entries.sort(key=lambda entry: -entry[0])
        del self.entries[self.size :]

    def is_settled(self, best_total: float, length: int) -> bool:
        """Whether the pool is full and a candidate of that total and length could not enter it."""
        return len(self.entries) == self.size and self.entries[-1][0] >= best_total / length**self.length_penalty

    def best(self) -> list[int]:
        if not self.entries:
            raise MiniGPT4Error(NOT_FINITE)
        return self.entries[0][1]


class _Beams:
    """What is being searched: ids_NL, their summed log-probabilities totals_N, logits_NV of the next token."""

    def __init__(
        self, llm: nn.Module, embeds_BTD: Tensor, mask_BT: Tensor, num_beams: int, graphs: CudaGraphs | None
    ) -> None:
        self.llm, self.num_beams = llm, num_beams
        self._graphs, self._fixed, self._unchanged = graphs, None, 0
        self.cache = KVCache() if graphs else DynamicCache(config=llm.config)
        self.mask = mask_BT
        position_ids_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        logits_BV = next_logits(llm, self.cache, self.mask, inputs_embeds=embeds_BTD, position_ids=position_ids_BT)
        self.cache.batch_repeat_interleave(num_beams)
        self.mask = mask_BT.repeat_interleave(num_beams, dim=0)
        self.logits_NV = logits_BV.repeat_interleave(num_beams, dim=0)
        self.ids_NL = torch.full((len(self.mask), 1), first_token(llm), device=self.mask.device)
        self.totals_N = torch.zeros(len(self.mask), device=self.mask.device)

    def select(self, candidates: list[_Candidate]) -> None:
        """Go on with K candidates of each row; rows without any leave the batch and the cache."""
        device = self.ids_NL.device
        parents_N = torch.tensor([c.parent for c in candidates], device=device)
        self.ids_NL = torch.tensor([c.ids for c in candidates], device=device)
        self.totals_N = torch.tensor([c.total for c in candidates], device=device)
        self.mask = nn.functional.pad(self.mask[parents_N], (0, 1), value=1)
        self._parents_N = parents_N

    def forward(self) -> None:
        if self._fixed is not None and (self._fixed.is_full or 2 * len(self._parents_N) <= self._fixed.size):
            self._unchanged = STEADY if self._fixed.is_full else 0
            self._fixed.release()
            self._fixed = None
        if self._fixed is not None:
            self.logits_NV = self._fixed.read(self.ids_NL[:, -1:], self._parents_N)
            return
        self.cache.batch_select_indices(self._parents_N)
        if self._graphs is not None and self._graphs.works and self._unchanged >= STEADY:
            self._fixed = FixedBatch(self.llm, self.cache, self.mask, self._graphs, branches=True)
            self.logits_NV = self._fixed.read(self.ids_NL[:, -1:])
            return
        self._unchanged += 1
        position_ids_N1 = self.mask.sum(dim=1, keepdim=True) - 1
        self.logits_NV = next_logits(
            self.llm, self.cache, self.mask, input_ids=self.ids_NL[:, -1:], position_ids=position_ids_N1
        )

    def hypotheses(self) -> list[list[tuple[list[int], float]]]:
        """Ids and totals of the running beams of each row."""
        beams = list(zip(self.ids_NL.tolist(), self.totals_N.tolist(), strict=True))
        rows = [beams[start : start + self.num_beams] for start in range(0, len(beams), self.num_beams)]
        return [[(ids, total) for ids, total in row if total > -inf] for row in rows]
