"""A folder of weights: sources in order, files put there by hand, the manifest."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from minigpt4.common.download import Retry
from minigpt4.common.errors import WeightsError
from minigpt4.common.weights import WeightsEntry, WeightsFolder

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("weights_server", ROOT / "tests" / "weights_server.py")
weights_server = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = weights_server  # dataclasses look their module up
spec.loader.exec_module(weights_server)

QUICK = Retry(tries=3, first_wait=0.01, timeout=10)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = weights_server.WeightsServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> bytes:
    """A torch file of about 4 MB."""
    path = tmp_path_factory.mktemp("torch") / "weights.pth"
    generator = torch.Generator().manual_seed(0)
    torch.save({"model": {"w": torch.randn(1000, 1000, generator=generator)}}, path)
    return path.read_bytes()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_file_larger_than_the_free_disk_is_refused_before_it_is_fetched(server, weights, tmp_path):
    entry = WeightsEntry("a", "a.pth", (server.put("/a.pth", weights),), 10**18, "made up", "nothing")
    with pytest.raises(WeightsError, match=r"about 1000000000\.0 GB still to come, .* free on this disk"):
        WeightsFolder(tmp_path).need_room([entry])


def test_folder_takes_a_file_put_there_by_hand_if_it_is_the_published_one(tmp_path, weights):
    entry = WeightsEntry("a", "a.pth", ("http://127.0.0.1:9/a",), 1, "made up", "x", sha256=sha256(weights))
    (tmp_path / "a.pth").write_bytes(weights)
    folder = WeightsFolder(tmp_path, QUICK)
    assert folder.get(entry)[0].source == "already there"
    assert folder.has(entry)
    assert folder.get(entry) == []


def test_folder_refuses_a_file_put_there_by_hand_that_is_another(tmp_path, weights):
    entry = WeightsEntry("a", "a.pth", ("http://127.0.0.1:9/a",), 1, "made up", "x", sha256="0" * 64)
    (tmp_path / "a.pth").write_bytes(weights)
    with pytest.raises(WeightsError, match="not the published a .*move it away"):
        WeightsFolder(tmp_path, QUICK).get(entry)
    assert (tmp_path / "a.pth").read_bytes() == weights


def test_folder_tries_the_sources_in_order(server, weights, tmp_path):
    sources = (server.url("/gone.pth"), server.put("/a.pth", weights))
    entry = WeightsEntry("a", "a.pth", sources, 1, "made up", "x")
    assert WeightsFolder(tmp_path, QUICK).get(entry)[0].source == sources[1]
    record = json.loads((tmp_path / "manifest.json").read_text())["files"]["a.pth"]
    assert record == {"name": "a", "source": sources[1], "bytes": len(weights), "sha256": sha256(weights)}


def test_folder_names_every_source_that_failed(server, tmp_path):
    entry = WeightsEntry("a", "a.pth", (server.url("/1"), server.url("/2")), 1, "made up", "x")
    with pytest.raises(WeightsError, match=r"(?s)no source gave it.*/1 is not there.*/2 is not there"):
        WeightsFolder(tmp_path, QUICK).get(entry)
