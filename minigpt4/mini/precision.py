"""Which precision the small LLM is faster in: processors differ, and their names do not tell."""

import time

import torch

_TOKENS, _WIDTH, _HIDDEN = 1024, 576, 1536
_ROUNDS = 5


def faster_precision() -> str:
    """`bf16` or `fp32`, by timing the LLM's largest product on this machine; `bf16` on a GPU."""
    if torch.cuda.is_available():
        return "bf16"
    seconds = {name: _seconds(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    return min(seconds, key=seconds.get)


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of several rounds; the first ones set the library up."""
    inputs, weight = torch.ones(_TOKENS, _WIDTH, dtype=dtype), torch.ones(_HIDDEN, _WIDTH, dtype=dtype)
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(inputs, weight)
        rounds.append(time.perf_counter() - start)
    return min(rounds)
