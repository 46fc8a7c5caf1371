"""Ranges for `__post_init__` of the schemas."""

MOST_SAMPLES = 1_000_000
"""Of a batch: far above what any GPU holds, and still a size that can be computed with."""


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """ValueError `key: value must be rule`, unless `ok`; `bind` adds section and file."""
    if not ok:
        raise ValueError(f"{key}: {value!r:.200} must be {rule}")


def at_least(schema: object, low: float, *keys: str) -> None:
    """Each of these fields is None or not below `low`."""
    for key in keys:
        value = getattr(schema, key)
        require(value is None or value >= low, key, value, f"at least {low}")


def batch_sizes(schema: object, *keys: str) -> None:
    """Each of these fields is None or the size of a batch."""
    for key in keys:
        value = getattr(schema, key)
        require(value is None or value >= 1, key, value, "at least 1")
        require(value is None or value <= MOST_SAMPLES, key, value, f"at most {MOST_SAMPLES:,}")
