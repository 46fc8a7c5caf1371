"""Knowing a large file without reading all of it."""

import hashlib
from pathlib import Path
from typing import Any

SAMPLED_BYTES = 1 << 20


def file_sample(path: Path) -> list[Any]:
    """Name, size and hash of beginning, middle and end of a file; 13 GB are known in an instant, if not proved."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({0, max(0, size // 2), max(0, size - SAMPLED_BYTES)}):
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES))
    return [path.name, size, digest.hexdigest()[:16]]
