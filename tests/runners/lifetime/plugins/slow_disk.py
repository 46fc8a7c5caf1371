"""Makes every part of a save take long enough to be hit: half a file, whole files with temporary names, and a new
file that has no card yet. Each says so in the log, in a line with "slow disk:".
"""

import io
import logging
import time
from pathlib import Path

import torch

log = logging.getLogger(__name__)
SECONDS = 0.03
fast_save, fast_replace = torch.save, Path.replace


def wait(what):
    log.warning("slow disk: %s", what)
    time.sleep(SECONDS)


def slow_save(content, file, **options):
    if options:  # not a checkpoint: a tensor on its way to another process
        return fast_save(content, file, **options)
    memory = io.BytesIO()
    fast_save(content, memory)
    whole = memory.getvalue()
    file.write(whole[: len(whole) // 2])
    file.flush()
    wait("half a file")
    return file.write(whole[len(whole) // 2 :])


def slow_replace(old, new):
    if Path(new).name.startswith("checkpoint_"):
        wait("new file without card" if Path(new).suffix == ".json" else "before the new file")
    return fast_replace(old, new)


torch.save, Path.replace = slow_save, slow_replace
