"""What answers are made from, in plain types, so that a later run knows its own files again."""

from pathlib import Path
from typing import Any

from minigpt4.common.experiment import PUBLISHED_PROCESSORS, Experiment
from minigpt4.common.file_sample import file_sample


def frozen_files(model: Any) -> list[list[Any]]:
    """Samples of the files of LLM, vision encoder and Q-Former that a `model:` section names."""
    files = sorted(model.llm_directory().iterdir())
    files += [Path(path) for key in ("vit_weights", "q_former_model") if (path := getattr(model, key, None))]
    return [file_sample(path) for path in files if path.is_file()]


def image_facts(cfg: Experiment) -> dict[str, Any]:
    """How images are processed; nothing for the usual way, of which older files say nothing either."""
    section = cfg.image_processor
    own = {key: value for key, value in section.kwargs.items() if value is not None}
    if section.name not in PUBLISHED_PROCESSORS:
        own["name"] = section.name
    return {"image_processor": own} if own else {}
