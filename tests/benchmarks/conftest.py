"""Benchmarks are scripts: they find each other in their own folder. Here they compute on one thread."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A script of benchmarks/ as a module."""

    def load(name: str) -> ModuleType:
        if str(BENCHMARKS) not in sys.path:
            sys.path.append(str(BENCHMARKS))
        return importlib.import_module(name)

    return load


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For all tests here."""
