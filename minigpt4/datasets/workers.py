"""Worker processes that make packets, or none at all, behind one iterator."""

import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minigpt4.datasets.packets import Packet

PREFETCH = 2
"""Packets that each worker makes ahead."""

_SAVE_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def read_packets(
    make: Callable[[int], Iterator[Packet]], *, num_workers: int, first: int = 0, pin_memory: bool = False
) -> Iterator[Packet]:
    """Packets of the readers in turn: first, first + 1, ..., round and round until all have ended.

    Args:
        make: the packets of reader `worker`, 0 <= worker < max(1, num_workers).
        num_workers: processes; 0: read here, when asked.
        first: the reader whose turn it is.
        pin_memory: put images into page-locked memory, in a thread.

    An error in a worker is a RuntimeError here, with the worker's traceback.
    """
    if num_workers == 0:
        return make(0)
    return _checked(_start(make, num_workers, first, pin_memory))


def _start(
    make: Callable[[int], Iterator[Packet]], num_workers: int, first: int, pin_memory: bool
) -> Iterator["Packet | _Failure"]:
    loader = DataLoader(
        _Turns(make, first, num_workers),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH,
        worker_init_fn=_outlive_signals,
        # torch would draw a seed for the workers from the global generator, which belongs to the model.
        generator=torch.Generator().manual_seed(0),
    )
    # Signals wait until the new process has said what to do with them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SAVE_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _checked(packets: Iterator["Packet | _Failure"]) -> Iterator[Packet]:
    for packet in packets:
        if isinstance(packet, _Failure):
            raise RuntimeError(f"a data worker failed; its traceback:\n{packet.traceback}")
        yield packet


@dataclass(frozen=True)
class _Failure:
    """The last word of a worker. A worker that lets torch pass the error on holds its end up by ten seconds."""

    traceback: str


class _Turns(IterableDataset):
    """Gives process i the reader whose turn is i-th; torch asks the processes in turn."""

    def __init__(self, make: Callable[[int], Iterator[Packet]], first: int, num_workers: int) -> None:
        self._make = make
        self._first = first
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[Packet | _Failure]:
        try:
            yield from self._make((self._first + get_worker_info().id) % self._num_workers)
        except Exception:
            yield _Failure(traceback.format_exc())


def _unchanged(packet: Packet | _Failure) -> Packet | _Failure:
    return packet


def _outlive_signals(worker: int) -> None:
    """Schedulers and terminals signal every process; the run must be able to save before its workers die.

    The first SIGTERM is let pass, the second ends the process: at the end of a run torch and then
    multiprocessing send one each to a worker that hangs in a read.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _next_one_ends)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SAVE_SIGNALS)


def _next_one_ends(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
