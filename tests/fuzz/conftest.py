"""Random inputs, the same in each run; `--fuzz-factor 100 --fuzz-seed 1` makes it many and others."""

import copy
import random
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest


class Chance(random.Random):
    """A random generator that changes trees and bytes."""

    def change(self, tree: Any, new: Callable[[Any], Any], names: Sequence[Any] = ()) -> Any:
        """The tree with one entry, at any depth, replaced by `new` of it, dropped, or added under one of `names`."""
        if not isinstance(tree, dict | list) or not tree or self.random() < 0.05:
            return new(tree)
        key = self.choice(list(tree)) if isinstance(tree, dict) else self.randrange(len(tree))
        changed, kind = copy.copy(tree), self.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1 and names and isinstance(tree, dict):
            changed[self.choice(names)] = new(None)
        else:
            changed[key] = self.change(tree[key], new, names)
        return changed

    def change_bytes(self, data: bytes) -> bytes:
        """Cut off, doubled, marked, or with some bytes replaced, dropped or added, some of them sizes too large."""
        for _ in range(self.choice((1, 1, 1, 2, 8))):
            at, count = self.randrange(len(data) + 1), self.choice((1, 1, 4, 8, 64))
            part = data[at : at + count]
            size = struct.pack("<q", self.choice((-1, 1 << 31, 1 << 62, 3_000_000_000)))[: len(part)]
            flipped = bytes(byte ^ 1 << self.randrange(8) for byte in part[:1]) + part[1:]
            ways = (self.randbytes(len(part)), bytes(len(part)), b"\xff" * len(part), flipped, b"", part + part, size)
            data = data[:at] + self.choice(ways) + data[at + count :]
        wholes = (data[: self.randrange(len(data) + 1)], b"", data + data, b"\xef\xbb\xbf" + data, b"[" * 10**5)
        return self.choice(wholes) if self.random() < 0.15 else data


@pytest.fixture
def random_cases(request: pytest.FixtureRequest, fuzz_factor: int) -> Callable[[int], Iterator[tuple[str, Chance]]]:
    """`random_cases(count)`: name and random generator of each case, `count` times `--fuzz-factor` of them."""
    seed = request.config.getoption("--fuzz-seed")

    def cases(count: int) -> Iterator[tuple[str, Chance]]:
        for number in range(count * fuzz_factor):
            name = f"{request.node.name}/{seed}/{number}"
            sys.stdout.write(f"{name}\n")  # pytest shows it where a case fails
            yield name, Chance(name)

    return cases
