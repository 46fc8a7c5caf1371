"""Random inputs, the same in each run; `--fuzz-factor 100 --fuzz-seed 1` makes it many and others."""

import random
import sys
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def random_cases(request: pytest.FixtureRequest) -> Callable[[int], Iterator[tuple[str, random.Random]]]:
    """`random_cases(count)`: name and random generator of each case, `count` times `--fuzz-factor` of them."""
    factor, seed = request.config.getoption("--fuzz-factor"), request.config.getoption("--fuzz-seed")

    def cases(count: int) -> Iterator[tuple[str, random.Random]]:
        for number in range(count * factor):
            name = f"{request.node.name}/{seed}/{number}"
            sys.stdout.write(f"{name}\n")  # pytest shows it where a case fails
            yield name, random.Random(name)

    return cases
