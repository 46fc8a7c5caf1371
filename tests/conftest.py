"""Shared fixtures: the golden numbers of the reference implementation (see tests/data/parity/README.md)."""

import json
from pathlib import Path

import pytest

PARITY = Path(__file__).parent / "data" / "parity"


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    return PARITY


@pytest.fixture(scope="session")
def golden() -> dict:
    """Inputs and expected results that are not tensors, by section."""
    return json.loads((PARITY / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_tensors() -> dict:
    """All expected tensors, named `<section>/<case>/<name>`."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(PARITY.glob("golden_*.safetensors")):
        tensors.update(load_file(file))
    return tensors
