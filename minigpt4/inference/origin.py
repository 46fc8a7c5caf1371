"""What answers are made from, in plain types, so that a later run knows its own files again."""

import hashlib
from pathlib import Path
from typing import Any

SAMPLED_BYTES = 1 << 20


def frozen_files(model: Any) -> list[list[Any]]:
    """Samples of the files of LLM, vision encoder and Q-Former that a `model:` section names."""
    files = sorted(model.llm_directory().iterdir())
    files += [Path(path) for key in ("vit_weights", "q_former_model") if (path := getattr(model, key, None))]
    return [file_sample(path) for path in files if path.is_file()]


def file_sample(path: Path) -> list[Any]:
    """Name, size and hash of beginning, middle and end of a file; 13 GB are known in an instant, if not proved."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({0, max(0, size // 2), max(0, size - SAMPLED_BYTES)}):
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES))
    return [path.name, size, digest.hexdigest()[:16]]
