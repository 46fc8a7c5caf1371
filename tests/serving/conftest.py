"""An engine on the tiny model whose answers a test can hold."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4.inference.engine import Engine
from minigpt4.processors import Blip2ImageEvalProcessor

DATA = Path(__file__).parents[1] / "data" / "images"
PATIENCE = 60
"""Seconds that a test waits for what should come at once; machines that run tests are busy."""


class HeldEngine(Engine):
    """Writes as fast as it can, or as many tokens as it is let."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._permits = None
        self._counting = threading.Lock()

    def hold(self):
        """From now on, only what is let."""
        self._permits = 0

    def let(self, tokens):
        with self._counting:
            self._permits += tokens

    def release(self):
        self._permits = None

    @contextmanager
    def held(self, tokens=0):
        """Inside, so many tokens are written and no more."""
        self._permits = tokens
        try:
            yield
        finally:
            self.release()

    def _step(self):
        with self._counting:
            go = self._permits != 0
            if self._permits and self._running:
                self._permits -= 1
        if go:
            super()._step()
        else:
            time.sleep(0.002)

    def wait_for(self, running, waiting=0):
        """Until so many answers are in the making, and so many wait."""
        wait_until(lambda: (self.num_running, self.num_waiting) == (running, waiting))


def wait_until(holds: Callable[[], bool]) -> None:
    """Until something that another thread does has happened."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(scope="session", name="wait_until")
def _wait_until():
    return wait_until


@pytest.fixture(scope="session")
def hostile_images(make_png) -> dict[str, bytes]:
    """Files that a visitor or client may send, each with a fault of its own."""
    return {
        "avif": (DATA / "avif_cut_in_transfer.jpg").read_bytes(),
        "dds": (DATA / "dds_named.jpg").read_bytes(),
        "line": make_png(1, 4_000_000),
        "long line": make_png(1, 50_000_000),
        "many pixels": make_png(20_000, 20_000),
        "text": b"<html></html>",
        "nothing": b"",
    }


@pytest.fixture(scope="session")
def make_engine(build_model, parity_dir) -> Iterator[Callable[..., HeldEngine]]:
    """`make_engine(**settings)`: an engine, started, over a model with the checkpoints `first` and `second`."""
    threads, engines = torch.get_num_threads(), []
    torch.set_num_threads(1)  # more cost more than they give on matrices of this size
    second = {"second": parity_dir / "train_main_checkpoint_0.pth"}

    def make(**settings):
        model = build_model(model_type="pretrain_vicuna0", end_sym="###").eval()
        engines.append(HeldEngine(model, Blip2ImageEvalProcessor(image_size=56), second, "first", **settings).start())
        return engines[-1]

    yield make
    for engine in engines:
        engine.release()
        engine.stop()
    torch.set_num_threads(threads)


@pytest.fixture
def nodelay(monkeypatch) -> list[int]:
    """TCP_NODELAY of each connection to a server here; else small pieces wait until the last one is acknowledged."""
    options, made = [], H11Protocol.connection_made

    def watched(protocol, transport):
        made(protocol, transport)
        options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(H11Protocol, "connection_made", watched)
    return options
