"""What answers are made from, in plain types, so that a later run knows its own files again."""

from pathlib import Path
from typing import Any

from minigpt4.common.file_sample import file_sample


def frozen_files(model: Any) -> list[list[Any]]:
    """Samples of the files of LLM, vision encoder and Q-Former that a `model:` section names."""
    files = sorted(model.llm_directory().iterdir())
    files += [Path(path) for key in ("vit_weights", "q_former_model") if (path := getattr(model, key, None))]
    return [file_sample(path) for path in files if path.is_file()]
