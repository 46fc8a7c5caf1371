"""Numbers of a run in few words, for the log."""

from collections.abc import Mapping

from torch import nn


def millions(number: int) -> str:
    """`5.12 M`, and small numbers as they are."""
    return f"{number / 1e6:.4g} M" if number >= 1_000_000 else f"{number:,}"


def counts(parameters: Mapping[str, nn.Parameter]) -> str:
    """`llama_proj 3,149,824`: parameters by the first part of their names."""
    found: dict[str, int] = {}
    for name, parameter in parameters.items():
        part = name.split(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    return ", ".join(f"{part} {count:,}" for part, count in found.items())
