"""Intervals of shares: how many of n things were so."""

import math

Z_95 = 1.959963984540054
"""The 97.5% point of the normal distribution."""


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95% Wilson score interval of the share `count / of`, both ends in 0 to 1.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927. Raises ValueError
    for a share of nothing or a count outside 0 to `of`.
    """
    if of < 1 or not 0 <= count <= of:
        raise ValueError(f"{count} of {of} is no share")
    share, square = count / of, Z_95**2
    centre = share + square / (2 * of)
    half = Z_95 * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    low, high = ((centre + side * half) / (1 + square / of) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)
