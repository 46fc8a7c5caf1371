"""Wilson intervals."""

import pytest

from minigpt4.evaluation.bootstrap import wilson


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [  # worked out by hand with z = 1.96: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
        (35, 100, 0.2636, 0.4475),
        (2, 100, 0.0055, 0.0700),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval_of_known_shares(count: int, of: int, low: float, high: float) -> None:
    assert wilson(count, of) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("count", "of"), [(0, 0), (-1, 5), (6, 5)])
def test_a_count_outside_the_whole_is_no_share(count: int, of: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson(count, of)
