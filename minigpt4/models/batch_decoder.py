"""Token by token, for rows that come and go: prompts join a running batch, and rows that ended leave it.

What a row says depends on its own prompt and settings: its neighbours change no more than the rounding, and not even
that where the LLM attends `BY_ROW`. Keys and values lie in room that is set aside, so a token copies nothing but
itself. Shapes: B rows, T prompt positions, P
positions in the cache, H heads of keys, E channels of a head, D channels of the LLM, V vocabulary.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicLayer,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.conversation.decoding import Decoding
from minigpt4.models.attention import is_batch_invariant, native_dtype
from minigpt4.models.cuda_graph import CudaGraphs
from minigpt4.models.fsdp import is_sharded
from minigpt4.models.llm import cache_arguments, end_tokens, first_token
from minigpt4.models.loss import can_pack

log = logging.getLogger(__name__)

ROOM = 32
"""Positions that are set aside at once: at most so many stay empty, and the cache is copied once in so many tokens."""
GRAPH_ROOM = 128
"""The same where a CUDA graph reads the tokens: attention reads all of the room, and more room is another graph."""
BLOCK = 8
"""Rows of every pass that reads new tokens where the LLM attends `BY_ROW`: other numbers would mean other kernels."""
STEADY = 8
"""Tokens without a change of the batch, after which a graph is worth its capture."""


class RowLayer(DynamicLayer):
    """One layer: `keys` and `values`, (B, H, P, E), are what is in use of two larger tensors."""

    at: Tensor | None = None
    """Where the next position goes, (1,) int64, if a graph reads all of the larger tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append positions; returns all of them, as attention in transformers expects."""
        if self.at is not None:
            for store, states in zip(self._stores, (key_states, value_states), strict=True):
                store.index_copy_(2, self.at, states)
            return tuple(self._stores)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = [key_states[:, :, :0], value_states[:, :, :0]]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._stores[0].shape[2]:
            self._set_room(end + ROOM)
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = states[: len(store)]  # those behind fill a block
        self._use(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor, first: int = 0) -> None:
        """These rows, in this order, from position `first` on."""
        end = self.get_seq_length() - first
        self._stores = [store[indices, :, first:] for store in self._stores]
        self._use(end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.keys), device=self.keys.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reorder(self, parents: Tensor) -> None:
        """Each row becomes a copy of its parent, in its place."""
        for store in self._stores:
            store.copy_(store.index_select(0, parents))

    def fix(self, at: Tensor, room: int) -> None:
        """From now on the tensors, with so much room, stay where they are."""
        self._set_room(room)
        self.at = at

    def release(self, end: int) -> None:
        """The opposite of `fix`, with so many positions in use."""
        self.at = None
        self._use(end)

    def _set_room(self, room: int) -> None:
        used = self.get_seq_length()
        self._stores = [nn.functional.pad(store[:, :, :used], (0, 0, 0, room - used)) for store in self._stores]

    def _use(self, end: int) -> None:
        self.keys, self.values = (store[:, :, :end] for store in self._stores)


class KVCache(Cache):
    """The layers of a decoder; an empty one has none yet."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RowLayer)

    def joined(self, other: "KVCache", positions: int) -> "KVCache":
        """These rows and then those of `other`, padded on the left to so many positions."""
        both = KVCache()
        for number, (own, new) in enumerate(zip(self.layers, other.layers, strict=True)):
            pairs = (own.keys, new.keys), (own.values, new.values)
            padded = [[nn.functional.pad(s, (0, 0, positions - s.shape[2], 0)) for s in pair] for pair in pairs]
            both.update(*map(torch.cat, padded), number)
        return both


TOP_K = 50
"""Candidates that sampling keeps: the default of transformers 4.30, which the published code never changed."""
NOT_FINITE = (
    "the LLM's logits are not finite numbers, so there is no answer: its weights are broken, or "
    "model.llm_precision: fp16 overflows where bf16 or fp32 would not"
)


@dataclass(eq=False)
class GenerationState:
    """An answer in the making."""

    decoding: Decoding
    stop: Sequence[str] = ()
    generator: torch.Generator | None = None
    """Of this row's sampling, on the LLM's device; None: the global one."""
    ids: list[int] = field(default_factory=list, init=False)
    """Of a row that has joined: bos, the answer so far, its end token if it ended by one."""
    ended: bool | None = field(default=None, init=False)
    """None while it goes on; True: an end token or a stop string came; False: the token limit did."""


class FixedBatch:
    """A batch in tensors that stay where they are, so that one CUDA graph reads all of its tokens.

    Rows that end keep their places, which nobody looks at, until it is released. `branches`: rows are beams, each of
    which goes on from any other.
    """

    def __init__(
        self, llm: nn.Module, cache: KVCache, mask_BP: Tensor, graphs: CudaGraphs, branches: bool = False
    ) -> None:
        self.size, self._end = mask_BP.shape
        self._llm, self._cache = llm, cache
        self._room = -(-(self._end + GRAPH_ROOM // 2) // GRAPH_ROOM) * GRAPH_ROOM
        self._places: Tensor | slice | None = None  # of the rows that go on; None: all of them
        self._parents_B = torch.arange(self.size, device=mask_BP.device) if branches else None
        self._at = torch.full((1,), self._end - 1, device=mask_BP.device)
        self._positions_B1 = mask_BP.sum(dim=1, keepdim=True) - 1
        self._ids_B1 = torch.zeros_like(self._positions_B1)
        dtype = llm.get_input_embeddings().weight.dtype
        visible_BR = nn.functional.pad(mask_BP.bool(), (0, self._room - self._end))
        self._bias_B11R = torch.zeros(visible_BR.shape, dtype=dtype, device=mask_BP.device)
        self._bias_B11R = self._bias_B11R.masked_fill(~visible_BR, torch.finfo(dtype).min / 2)[:, None, None]
        for layer in cache.layers:
            layer.fix(self._at, self._room)
        self._pass = graphs.capture(self._read, mask_BP.device)

    @property
    def is_full(self) -> bool:
        return self._end > self._room

    def read(self, newest_B1: Tensor, parents_B: Tensor | None = None) -> Tensor:
        """Logits (B, V) float32 after the newest tokens of the rows that go on; of beams, from these parents."""
        if parents_B is not None:
            self._places = slice(len(parents_B))
            self._parents_B[self._places] = parents_B
            self._positions_B1[self._places] = self._positions_B1[parents_B]
            self._bias_B11R[self._places] = self._bias_B11R[parents_B]
        if self._places is None:
            self._ids_B1.copy_(newest_B1)
        else:
            self._ids_B1[self._places] = newest_B1
        logits_BV = self._pass()
        self._end += 1
        self._at += 1
        self._positions_B1 += 1
        if not self.is_full:
            self._bias_B11R.index_fill_(3, self._at, 0)
        return logits_BV if self._places is None else logits_BV[self._places]

    def keep(self, rows: Tensor) -> None:
        """Only these of the rows that went on so far go on."""
        self._places = rows if self._places is None else self._places[rows]

    def release(self) -> None:
        """The cache grows again, and holds the rows that go on."""
        for layer in self._cache.layers:
            layer.release(self._end - 1)
            if isinstance(self._places, Tensor):
                layer.batch_select_indices(self._places)

    def _read(self) -> Tensor:
        if self._parents_B is not None:
            for layer in self._cache.layers:
                layer.reorder(self._parents_B)
        inputs = {"input_ids": self._ids_B1, "position_ids": self._positions_B1}
        return next_logits(self._llm, self._cache, self._bias_B11R, **inputs)


class BatchDecoder:
    """Decodes rows with one beam each by a causal LM of transformers, whose `generation_config` has the end tokens.

    `graphs`: read the tokens of a batch that stays the same by a CUDA graph (`token_graphs`).
    """

    def __init__(self, llm: nn.Module, tokenizer: PreTrainedTokenizerBase, graphs: CudaGraphs | None = None) -> None:
        self.llm, self.tokenizer, self.end_ids = llm, tokenizer, end_tokens(llm)
        self.rows: list[GenerationState] = []
        """Those that go on, in the order in which they joined."""
        self._cache = KVCache()
        self._mask_BP: Tensor | None = None
        self._is_padded = False
        self._logits_BV: Tensor | None = None  # None: the newest tokens are not read yet
        self._newest_B1: Tensor | None = None
        self._graphs, self._fixed, self._unchanged = graphs, None, 0

    @property
    def room(self) -> int:
        """So many rows may join."""
        return BLOCK - len(self.rows) if is_batch_invariant(self.llm) else sys.maxsize

    @torch.inference_mode()
    def add(self, rows: Sequence[GenerationState], embeds_BTD: Tensor, mask_BT: Tensor) -> None:
        """Rows join, at most `room`, with their prompts, which are padded on the left with mask 0."""
        left = iter(rows)
        for embeds_JTD, mask_JT in prompts_apart(self.llm, embeds_BTD, mask_BT):
            self._join(list(islice(left, len(mask_JT))), embeds_JTD, mask_JT)

    def _join(self, rows: list[GenerationState], embeds_BTD: Tensor, mask_BT: Tensor) -> None:
        if self.rows:
            self._read_newest()
            self._release()
        cache = KVCache()
        position_ids_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        logits_BV = next_logits(self.llm, cache, mask_BT, inputs_embeds=embeds_BTD, position_ids=position_ids_BT)
        if self.rows:
            width = max(self._mask_BP.shape[1], mask_BT.shape[1])
            cache = self._cache.joined(cache, width)
            masks = [nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask_BP, mask_BT)]
            mask_BT = torch.cat(masks)
            logits_BV = torch.cat([self._logits_BV, logits_BV])
        self._cache, self._mask_BP, self._logits_BV = cache, mask_BT, logits_BV
        self._is_padded = not mask_BT.all().item()
        for row in rows:
            row.ids = [first_token(self.llm)]
        self.rows = [*self.rows, *rows]

    @torch.inference_mode()
    def step(self) -> None:
        """Every row says one token; those that ended leave.

        Raises MiniGPT4Error where logits are not finite numbers.
        """
        self._read_newest()
        for row, token in zip(self.rows, self._chosen_tokens(), strict=True):
            row.ids.append(token)
        self._logits_BV = None
        self._mask_BP = nn.functional.pad(self._mask_BP, (0, 1), value=1)
        ends = stopped(self.tokenizer, [row.ids for row in self.rows], [row.stop for row in self.rows])
        for row, is_stopped in zip(self.rows, ends, strict=True):
            if is_stopped or row.ids[-1] in self.end_ids:
                row.ended = True
            elif len(row.ids) > row.decoding.max_new_tokens:
                row.ended = False
        self._keep([index for index, row in enumerate(self.rows) if row.ended is None])

    @torch.inference_mode()
    def remove(self, rows: Iterable[GenerationState]) -> None:
        leaving = {id(row) for row in rows}
        self._keep([index for index, row in enumerate(self.rows) if id(row) not in leaving])

    def _read_newest(self) -> None:
        if self._logits_BV is not None:
            return
        if self._fixed is not None and self._fixed.is_full:
            self._release(steady=True)
        if self._fixed is None and self._graphs is not None and self._graphs.works and self._unchanged >= STEADY:
            self._fixed = FixedBatch(self.llm, self._cache, self._mask_BP, self._graphs)
        if self._fixed is not None:
            self._logits_BV = self._fixed.read(self._newest_B1)
            return
        self._unchanged += 1
        position_ids_B1 = self._mask_BP.sum(dim=1, keepdim=True) - 1
        mask_BP = self._mask_BP if self._is_padded else None  # transformers would wait for the GPU to look at it
        inputs = {"input_ids": self._newest_B1, "position_ids": position_ids_B1}
        if is_batch_invariant(self.llm):
            free = (0, 0, 0, self.room)
            mask_BP = nn.functional.pad(self._mask_BP, free)
            inputs = {name: nn.functional.pad(states, free) for name, states in inputs.items()}
        self._logits_BV = next_logits(self.llm, self._cache, mask_BP, **inputs)[: len(self.rows)]

    def _release(self, steady: bool = False) -> None:
        if self._fixed is not None:
            self._fixed.release()
        self._fixed, self._unchanged = None, STEADY if steady else 0

    def _chosen_tokens(self) -> list[int]:
        groups = self._alike()
        tokens_B = torch.empty(len(self.rows), dtype=torch.long, device=self._logits_BV.device)
        for members in groups:
            first, at = self.rows[members[0]], members if len(groups) > 1 else slice(None)
            scores_MV = self._logits_BV[at]
            processors = penalties(first.decoding, self.end_ids, scores_MV.device)
            if processors:
                ids_ML = torch.tensor([self.rows[index].ids for index in members], device=scores_MV.device)
                scores_MV = processors(ids_ML, scores_MV)
            if not first.decoding.do_sample:
                tokens_B[at] = scores_MV.argmax(dim=-1)
                continue
            shares_MV = warpers(first.decoding, min_tokens_to_keep=1)(None, scores_MV).softmax(dim=-1).nan_to_num()
            tokens_B[at] = torch.multinomial(shares_MV, 1, generator=first.generator).squeeze(1)
        self._newest_B1 = tokens_B[:, None]
        finite_B = self._logits_BV.sum(dim=1).isfinite().long()  # one pass: whatever is not finite spreads to the sum
        tokens, finite = torch.stack([tokens_B, finite_B]).tolist()  # the one time that the host waits for the device
        if not all(finite):
            raise MiniGPT4Error(NOT_FINITE)
        return tokens

    def _alike(self) -> list[list[int]]:
        """Indices of rows whose tokens can be chosen together."""

        def kind(index: int) -> tuple:
            row = self.rows[index]
            decoding = row.decoding
            plain = decoding.repetition_penalty == 1 and decoding.min_length <= 1
            own = id(row.generator) if decoding.do_sample and row.generator is not None else 0
            return repr(decoding), 0 if plain else len(row.ids), own

        return [list(group) for _, group in groupby(sorted(range(len(self.rows)), key=kind), key=kind)]

    def _keep(self, indices: list[int]) -> None:
        if len(indices) == len(self.rows):
            return
        if not indices:
            self.rows, self._cache, self._mask_BP, self._logits_BV = [], KVCache(), None, None
            self._fixed, self._unchanged = None, 0
            return
        self.rows = [self.rows[index] for index in indices]
        chosen = torch.tensor(indices, device=self._mask_BP.device)
        if self._logits_BV is not None:
            self._logits_BV = self._logits_BV[chosen]
        else:
            self._newest_B1 = self._newest_B1[chosen]
        mask_BP = self._mask_BP[chosen]
        if self._fixed is not None and 2 * len(indices) > self._fixed.size:
            self._mask_BP = mask_BP
            self._fixed.keep(chosen)
            return
        self._release()
        unused = int(mask_BP.any(dim=0).int().argmax())  # positions on the left that are padding in all rows now
        self._mask_BP = mask_BP[:, unused:]
        self._is_padded = not self._mask_BP.all().item()
        for layer in self._cache.layers:
            layer.batch_select_indices(chosen, unused)


def token_graphs(cfg: MiniGPT4Config, llm: nn.Module) -> CudaGraphs | None:
    """What `model.llm_cuda_graph` gives a `BatchDecoder` of this LLM."""
    serves = can_pack(llm) and not is_sharded(llm)
    if cfg.llm_cuda_graph and not serves:
        log.warning("model.llm_cuda_graph: only for LLaMA-like LLMs that one GPU holds whole; the run goes on without")
    return CudaGraphs("model.llm_cuda_graph") if cfg.llm_cuda_graph and serves else None


def prompts_apart(llm: nn.Module, embeds_BTD: Tensor, mask_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts and masks that are read together: all, or each by itself and without padding if it is `BY_ROW`."""
    if not is_batch_invariant(llm):
        yield embeds_BTD, mask_BT
        return
    for embeds_TD, mask_T in zip(embeds_BTD, mask_BT, strict=True):
        yield embeds_TD[mask_T.bool()][None], mask_T[mask_T.bool()][None]


def next_logits(llm: nn.Module, cache: Cache, mask_BP: Tensor | None, **inputs: Tensor) -> Tensor:
    """Logits (B, V) float32 after the last position of `inputs`, which the cache takes in; of no other position.

    `mask_BP`: of the cache and the inputs; None where nothing is padding.
    """
    first = next(iter(inputs.values()))
    last = torch.full((1,), first.shape[1] - 1, device=first.device)
    with native_dtype(llm):
        # An index, not a number: a slice would not be contiguous, and CPUs copy the head's weights for it.
        logits_B1V = llm(**inputs, **cache_arguments(llm, cache), attention_mask=mask_BP, logits_to_keep=last).logits
    return logits_B1V[:, 0].float()


def penalties(decoding: Decoding, end_ids: list[int], device: torch.device) -> LogitsProcessorList:
    """What changes the scores before a token is chosen, whether it is sampled or not."""
    processors = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if end_ids and decoding.min_length > 1:  # the bos token counts, so 1 is always reached
        processors.append(MinLengthLogitsProcessor(decoding.min_length, end_ids, device=str(device)))
    return processors


def warpers(decoding: Decoding, min_tokens_to_keep: int) -> LogitsProcessorList:
    """What sampling does to the scores; transformers 4.30 kept two tokens with several beams, one without."""
    top_k = TopKLogitsWarper(TOP_K, min_tokens_to_keep=min_tokens_to_keep)
    top_p = TopPLogitsWarper(float(decoding.top_p), min_tokens_to_keep=min_tokens_to_keep)
    return LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature)), top_k, top_p])


def stopped(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]], stops: Sequence[Sequence[str]]
) -> list[bool]:
    """Whether the newest token of each row, bos first, completed one of the row's stop strings.

    Compares text, not ids, for a tokenizer can write `###` in more than one way. A token holds at least one byte.
    """
    if not any(stops):
        return [False] * len(rows)
    lengths = [1 + max((len(text.encode()) for text in stop), default=0) for stop in stops]
    texts = tokenizer.batch_decode([ids[max(1, len(ids) - n) :] for ids, n in zip(rows, lengths, strict=True)])
    return [any(stop in text for stop in own) for own, text in zip(stops, texts, strict=True)]
