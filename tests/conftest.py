"""Shared fixtures: the golden numbers of the reference implementation (see tests/data/parity/README.md), a chat server,
a browser."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER_TESTS = "MINIGPT4_BROWSER_TESTS"
"""Set to `required`, as `.ci/run` does, a missing browser is a failure; else the tests are skipped with the reason."""
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


@pytest.fixture
def chat_server() -> Iterator[Any]:
    """A fresh chat endpoint on this machine; see judge_server.py."""
    name = "judge_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    server = sys.modules[name].ChatServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Debian's Chromium, which playwright drives."""
    found = shutil.which("chromium")
    lack = None if found else "there is no chromium on the PATH"
    if importlib.util.find_spec("playwright") is None:
        lack = "the package playwright is missing"
    if lack is None:
        return found
    reason = f'{lack}: apt-get install chromium; pip install -e ".[dev]"'
    if os.environ.get(BROWSER_TESTS) == "required":
        pytest.fail(f"{BROWSER_TESTS} is 'required', but {reason}")
    return pytest.skip(reason)
