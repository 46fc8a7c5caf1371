"""Worker processes that make batches, behind one iterator.

No worker outlives the process that started it, and that process never waits for a worker to end: both would leave
a run hanging, on this machine or on those of the other ranks.
"""

import atexit
import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minigpt4.common.dist_utils import SAVE_AND_STOP
from minigpt4.common.errors import MiniGPT4Error, RunError

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")

PREFETCH = 2
"""Batches that each worker makes ahead."""

LOOK = 60.0
"""Seconds of waiting for a batch after which a warning tells of it."""

PATIENCE = 30
"""Such waits in a row before it is an error; the other ranks do not wait longer for this one either. They are counted,
not measured, so that a job that a scheduler suspends and wakes up goes on."""

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the thread that forked it ends."""

_running: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)


def read_in_workers(
    make: Callable[[int], Iterator[Batch]], *, source: str, num_workers: int, first: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Batches of the workers in turn: first, first + 1, ..., round and round until all have ended.

    Args:
        make: the batches of a worker, 0 <= worker < num_workers.
        source: what is read, for errors.
        num_workers: processes, which start here and end with the thread that calls this.
        pin_memory: put images into page-locked memory, in a thread.

    An error in a worker is a RuntimeError here, with the worker's traceback, and one of ours is itself. RunError if a
    worker hangs.
    """
    loader = DataLoader(
        _Turns(make, first, num_workers),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH,
        timeout=LOOK,
        worker_init_fn=functools.partial(_init_worker, os.getpid()),
        # torch would draw a seed for the workers from the global generator, which belongs to the model.
        generator=torch.Generator().manual_seed(0),
    )
    others = set(multiprocessing.active_children())
    _hold_signals(True)  # until the new process has said what to do with them
    try:
        return _received(iter(loader), source)
    finally:
        _running.update(set(multiprocessing.active_children()) - others)
        _hold_signals(False)


def _hold_signals(on: bool) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if on else signal.SIG_UNBLOCK, SAVE_AND_STOP)


def _received(batches: "Iterator[Batch | _Failure | MiniGPT4Error]", source: str) -> Iterator[Batch]:
    waits = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out after" not in str(error):
                raise
            waits += 1
            waited = f"{source}: no batch for {waits * LOOK / 60:.3g} minutes"
            if waits >= PATIENCE:
                way_out = "look whether the storage answers; run.resume_ckpt_path=auto goes on from the last checkpoint"
                raise RunError(f"{waited}: a data worker hangs; {way_out}") from error
            log.warning("%s; the data workers are slow, or the storage does not answer", waited)
            continue
        if isinstance(batch, MiniGPT4Error):
            try:
                raise batch
            finally:
                del batch  # or it would hold itself, and the loader until a garbage collection, which stops for 10 s
        if isinstance(batch, _Failure):
            raise RuntimeError(f"a data worker failed; its traceback:\n{batch}")
        waits = 0
        yield batch


class _Failure(str):
    """The traceback of a worker, its last word: one that lets torch pass the error on ends ten seconds late."""


class _Turns(IterableDataset):
    """Gives process i the worker whose turn is i-th; torch asks the processes in turn."""

    def __init__(self, make: Callable[[int], Iterator[Batch]], first: int, num_workers: int) -> None:
        self._make, self._first, self._num_workers = make, first, num_workers

    def __iter__(self) -> Iterator[Batch | _Failure | MiniGPT4Error]:
        try:
            yield from self._make((self._first + get_worker_info().id) % self._num_workers)
        except MiniGPT4Error as error:
            yield type(error)(str(error))  # what it was raised from may not go to another process
        except Exception:
            yield _Failure(traceback.format_exc())


def _init_worker(parent: int, worker: int) -> None:
    """Stay until the process `parent` ends, whatever else happens, and not longer."""
    # Schedulers and terminals signal every process; the run must be able to save before its workers die.
    for number in SAVE_AND_STOP:
        signal.signal(number, signal.SIG_IGN)
    _hold_signals(False)
    # A worker that is left over keeps the sockets of its rank open, and the other ranks wait for an answer. By itself
    # it looks for its parent only every few seconds, and never while it hangs in a read.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was too fast
            os._exit(1)


@atexit.register
def _kill_workers() -> None:
    """At the end of the process, before multiprocessing asks them by SIGTERM, which they ignore, and waits for ever.

    That a loader has ended its workers before is not certain: the traceback of an error may hold it.
    """
    left = [process for process in _running if process.is_alive()]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each as a failure
    for process in left:
        process.kill()
