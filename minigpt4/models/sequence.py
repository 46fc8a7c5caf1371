"""Where text and images become what the LLM reads: ids, attention mask, targets, image slots, embeddings.

Pure functions on lists and tensors. A `TokenSequence` is one sequence under construction; its four lists grow together,
segment by segment, so that a mask or a target cannot drift from its token.
Shapes: B rows, T positions, D channels of the LLM, M image tokens of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

IMAGE_PLACEHOLDER = "<ImageHere>"
IGNORE = -100
"""Target of a position that is not trained on."""
NO_IMAGE = -1


@dataclass
class TokenSequence:
    """One sequence: token ids, targets, attention, and which image token (if any) stands at each position."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    attend: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add_text(self, ids: Sequence[int], *, train: bool = False) -> "TokenSequence":
        """Append tokens, as targets if `train`."""
        self.ids += ids
        self.targets += ids if train else [IGNORE] * len(ids)
        self.attend += [1] * len(ids)
        self.images += [NO_IMAGE] * len(ids)
        return self

    def add_image(self, start: int, count: int) -> "TokenSequence":
        """Append image tokens `start` to `start + count - 1` of the batch's flat list."""
        self.ids += [0] * count
        self.targets += [IGNORE] * count
        self.attend += [1] * count
        self.images += range(start, start + count)
        return self

    def cut(self, length: int) -> "TokenSequence":
        """Keep the first `length` positions."""
        for name in ("ids", "targets", "attend", "images"):
            del getattr(self, name)[length:]
        return self

    def hide_target(self, token_id: int) -> "TokenSequence":
        """Do not train on `token_id` (the published rule for single answers)."""
        self.targets = [IGNORE if target == token_id else target for target in self.targets]
        return self

    def hide_from_attention(self, token_id: int) -> "TokenSequence":
        """Do not attend to `token_id` (the published rule for conversations, which keep it as a target)."""
        self.attend = [int(id_ != token_id) for id_ in self.ids]
        return self

    @property
    def num_targets(self) -> int:
        """Positions trained on."""
        return sum(target != IGNORE for target in self.targets)


@dataclass
class Batch:
    """Rows of one length. All tensors are int64 on the CPU until `to`."""

    ids_BT: Tensor
    attention_mask_BT: Tensor
    targets_BT: Tensor
    image_at: tuple[Tensor, Tensor]
    """Row and column of every position that an image token takes, (M',) each."""
    image_source: Tensor
    """Index of that image token in the flat list, (M',)."""

    lengths_B: Tensor
    """Positions of each row before padding on the right, or after padding on the left."""

    @property
    def num_targets(self) -> int:
        """Positions trained on; reads the targets, so ask before `to` moves them to a GPU."""
        return int((self.targets_BT != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            to_device(self.ids_BT, device),
            to_device(self.attention_mask_BT, device),
            to_device(self.targets_BT, device),
            tuple(to_device(index, device) for index in self.image_at),
            to_device(self.image_source, device),
            to_device(self.lengths_B, device),
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on `device`; from page-locked memory to a GPU, for then the host need not wait."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def split_prompt(prompt: str) -> list[str]:
    """The texts around the image placeholders: n placeholders give n + 1 texts, each possibly empty."""
    return prompt.split(IMAGE_PLACEHOLDER)


def prompt_row(
    texts: Sequence[Sequence[int]], images: Sequence[tuple[int, int]], start: Sequence[int] = ()
) -> TokenSequence:
    """`start`, then text ids and images in turn; `images` holds (start, count) of each image's tokens.

    Raises ValueError unless there is exactly one more text than images.
    """
    if len(texts) != len(images) + 1:
        raise ValueError(f"the prompt has {len(texts) - 1} {IMAGE_PLACEHOLDER}, but {len(images)} images were given")
    row = TokenSequence().add_text(list(start))
    for text, image in zip(texts, images, strict=False):
        row.add_text(list(text)).add_image(*image)
    return row.add_text(list(texts[-1]))


def answer_row(ids: Sequence[int], end_ids: Sequence[int], max_len: int, *, truncate_end: bool) -> TokenSequence:
    """An answer that ends in its end symbol, at most `max_len` tokens.

    A longer one loses tokens before the end symbol, or with `truncate_end` its end (the published behaviour).
    """
    ids = list(ids)
    if len(ids) > max_len:
        ids = ids[:max_len] if truncate_end else ids[: max_len - len(end_ids)] + list(end_ids)
    return TokenSequence().add_text(ids, train=True)


def conversation_row(
    answers: Sequence[Sequence[int]],
    questions: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    max_len: int,
    *,
    truncate_end: bool,
) -> TokenSequence:
    """answer, question, answer, ...: answers are trained on, the chain has at most `max_len` tokens.

    Unless `truncate_end`, a chain that is cut inside an answer still ends in the end symbol, and a question
    whose answer is cut away goes with it.
    """
    row = TokenSequence()
    for turn, answer in enumerate(answers):
        if turn:
            question = list(questions[turn - 1])
            if not truncate_end and len(row) + len(question) + len(end_ids) >= max_len:
                return row
            row.add_text(question)
        room = max_len - len(row)
        if not truncate_end and len(answer) > room:
            row.add_text(list(answer[: room - len(end_ids)]) + list(end_ids), train=True)
            return row
        row.add_text(list(answer), train=True)
    return row.cut(max_len)


def collate_training(
    conditions: Sequence[TokenSequence], answers: Sequence[TokenSequence], start: Sequence[int], pad_id: int
) -> Batch:
    """`start` (bos), condition, answer, padding on the right.

    T is len(start) + longest condition + longest answer, as in the published code, whose padded length enters
    the loss with `reduction="none"`. Padding carries the embedding of `pad_id` and mask 0.
    """
    width = len(start) + max(map(len, conditions)) + max(map(len, answers))
    rows = [_join(TokenSequence().add_text(list(start)), c, a) for c, a in zip(conditions, answers, strict=True)]
    return _stack(rows, width, pad_id, left=False)


def collate_prompts(rows: Sequence[TokenSequence], pad_id: int) -> Batch:
    """Prompts of different lengths, padded on the left for generation."""
    return _stack(rows, max(map(len, rows)), pad_id, left=True)


def embed(batch: Batch, embedding: nn.Module, image_tokens_MD: Tensor | None) -> Tensor:
    """(B, T, D) in the dtype of the embedding table: token embeddings with the image tokens in their places."""
    with torch.no_grad():
        embeds_BTD = embedding(batch.ids_BT)
    if image_tokens_MD is None or not len(batch.image_source):
        return embeds_BTD
    placed = image_tokens_MD.to(embeds_BTD.dtype)[batch.image_source]
    return embeds_BTD.index_put(batch.image_at, placed)


def target_columns(batch: Batch) -> Tensor:
    """Positions (K,) whose next token is a target in any row: the only ones whose logits the loss needs."""
    return (batch.targets_BT[:, 1:] != IGNORE).any(dim=0).nonzero().squeeze(1)


def target_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and column (N,) of every position whose next token is a target, in order."""
    return (batch.targets_BT[:, 1:] != IGNORE).nonzero(as_tuple=True)


def _join(*rows: TokenSequence) -> TokenSequence:
    joined = TokenSequence()
    for row in rows:
        joined.ids += row.ids
        joined.targets += row.targets
        joined.attend += row.attend
        joined.images += row.images
    return joined


def _stack(rows: Sequence[TokenSequence], width: int, pad_id: int, *, left: bool) -> Batch:
    def padded(lists: list[list[int]], fill: int) -> Tensor:
        gaps = [[fill] * (width - len(values)) for values in lists]
        full = [gap + v if left else v + gap for v, gap in zip(lists, gaps, strict=True)]
        return torch.tensor(full, dtype=torch.long)

    images_BT = padded([row.images for row in rows], NO_IMAGE)
    at_row, at_column = (images_BT != NO_IMAGE).nonzero(as_tuple=True)
    return Batch(
        ids_BT=padded([row.ids for row in rows], pad_id),
        attention_mask_BT=padded([row.attend for row in rows], 0),
        targets_BT=padded([row.targets for row in rows], IGNORE),
        image_at=(at_row, at_column),
        image_source=images_BT[at_row, at_column],
        lengths_B=torch.tensor([len(row) for row in rows]),
    )
