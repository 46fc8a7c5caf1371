"""As many forward passes of a sharded LLM on every process, where some have more to do than others.

A sharded LLM computes on all processes together, or on none. Where their numbers of passes differ (validation, answers
of different lengths, evaluations), one that has finished goes on with passes whose result nobody reads, until all
have: before each pass every process tells the others whether it is a real one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minigpt4.common.errors import RunError
from minigpt4.models.freeze import compute_as_stored
from minigpt4.models.sharded_llm import empty_pass, is_sharded


@contextmanager
def in_step(llm: nn.Module) -> Iterator[None]:
    """Inside, processes may call a sharded LLM as often as each needs; all of them must enter, and leave together.

    Nothing else in there may wait for other processes. After an error nobody is waited for: the process is to end, and
    its launcher ends the others. An LLM that is not sharded is left alone.

    Raises RunError if the others do not come in the time that the process group waits.
    """
    if not is_sharded(llm):
        yield
        return
    handle = llm.base_model.register_forward_pre_hook(_tell_real)
    try:
        yield
    finally:
        handle.remove()
    with torch.no_grad(), compute_as_stored(llm):
        while _tell(llm, is_real=False).item():
            empty_pass(llm)


def _tell_real(base_model: nn.Module, _: Any) -> None:
    _tell(base_model, is_real=True)


def _tell(llm: nn.Module, *, is_real: bool) -> Tensor:
    """How many processes make a real pass now; the host waits only if it reads the number."""
    count = torch.tensor(float(is_real), device=llm.get_input_embeddings().weight.device)
    try:
        dist.all_reduce(count)
    except RuntimeError as error:
        raise RunError(
            f"run.parallel: fsdp: the other processes did not come to the LLM's next pass: {error}. One of them has "
            "died or waits elsewhere; its own output says why"
        ) from error
    return count
