"""An engine on the tiny model whose answers a test can hold."""

import threading
import time
from pathlib import Path

import pytest
import torch

from minigpt4.inference import Engine
from minigpt4.processors import Blip2ImageEvalProcessor


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

    def _step(self):
        with self._counting:
            if self._permits == 0:
                go = False
            else:
                go = True
                self._permits = None if self._permits is None else self._permits - 1
        if go:
            super()._step()
        else:
            time.sleep(0.002)

    def wait_for(self, running):
        """Until so many answers are in the making."""
        until = time.monotonic() + 60
        while self.num_running != running:
            assert time.monotonic() < until, f"{self.num_running} answers are in the making, not {running}"
            time.sleep(0.005)


DATA = Path(__file__).parents[1] / "data" / "images"


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


@pytest.fixture(scope="module")
def make_engine(shared_model):
    """`make_engine(**changes)`: an engine that was started."""
    threads, engines = torch.get_num_threads(), []
    torch.set_num_threads(1)

    def make(**changes):
        model = shared_model(model_type="pretrain_vicuna0", end_sym="###")
        engines.append(HeldEngine(model, Blip2ImageEvalProcessor(image_size=56), **changes).start())
        return engines[-1]

    yield make
    for engine in engines:
        engine.release()
        engine.stop()
    torch.set_num_threads(threads)
