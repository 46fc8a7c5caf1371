"""Keys and values of rows that come and go, in room that is set aside: a token, or a row that leaves, copies little.

The cache of transformers is a tensor that is copied as a whole for each new token and for each row that leaves. Here
both happen in place, so the rows of a batch change their order: where one leaves, the last one takes its place.
Shapes: B rows, H heads of keys, P positions, E channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer

ROOM = 32
"""Positions that are set aside at once: at most so many stay empty, and the cache is copied once in so many tokens."""


class RowLayer(DynamicLayer):
    """One layer: `keys` and `values`, (B, H, P, E), are what is in use of two larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._stores: list[Tensor] = []
        self._first = 0  # position of the stores that is the first in use

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append positions; returns all of them, as attention in transformers expects."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        end = self._first + self.keys.shape[2] + key_states.shape[2]
        if not self._stores or end > self._stores[0].shape[2]:
            self._stores = [_with_room(self.keys, key_states), _with_room(self.values, value_states)]
            end, self._first = end - self._first, 0
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[: len(states), :, end - states.shape[2] : end] = states
        self._use(len(key_states), end)
        return self.keys, self.values

    def move(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """The rows at `sources` go to the places `targets`, which are others; then the first `rows` are in use."""
        if len(sources):
            self.keys[targets], self.values[targets] = self.keys[sources], self.values[sources]
        self._use(rows, self._first + self.keys.shape[2])

    def drop_first(self, positions: int) -> None:
        """The first positions are not in use any more."""
        end = self._first + self.keys.shape[2]
        self._first += positions
        self._use(len(self.keys), end)

    def _use(self, rows: int, end: int) -> None:
        self.keys, self.values = (store[:rows, :, self._first : end] for store in self._stores)


class RowCache(Cache):
    """The layers of a decoder; an empty one has none yet."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RowLayer)

    def keep(self, indices: Sequence[int]) -> list[int]:
        """Only these rows stay, ascending indices; returns which one of them is at each place now."""
        count, kept = len(indices), set(indices)
        free = [place for place in range(count) if place not in kept]
        movers = [index for index in indices if index >= count]
        order = list(range(count))
        for place, mover in zip(free, movers, strict=True):
            order[place] = mover
        for layer in self.layers:
            sources, targets = (torch.tensor(places, device=layer.keys.device) for places in (movers, free))
            layer.move(sources.long(), targets.long(), count)
        return order

    def drop_first(self, positions: int) -> None:
        """The first positions of all rows are not in use any more."""
        for layer in self.layers:
            layer.drop_first(positions)

    def joined(self, other: "RowCache", positions: int) -> "RowCache":
        """These rows and then those of `other`, padded on the left to so many positions."""
        both = RowCache()
        for number, (own, new) in enumerate(zip(self.layers, other.layers, strict=True)):
            keys, values = (
                torch.cat([_padded(old, positions), _padded(added, positions)])
                for old, added in ((own.keys, new.keys), (own.values, new.values))
            )
            both.update(keys, values, number)
        return both


def _with_room(states_BHPE: Tensor, more_BHPE: Tensor) -> Tensor:
    """A copy, with room behind it for more positions and some to come."""
    rows, heads, positions, channels = states_BHPE.shape
    store = states_BHPE.new_empty(rows, heads, positions + more_BHPE.shape[2] + ROOM, channels)
    store[:, :, :positions] = states_BHPE
    return store


def _padded(states_BHPE: Tensor, positions: int) -> Tensor:
    return nn.functional.pad(states_BHPE, (0, 0, positions - states_BHPE.shape[2], 0))
