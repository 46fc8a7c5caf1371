"""Names of the Hugging Face Hub where a folder or file of weights is asked for.

A name that is no path here, `lmsys/vicuna-7b-v1.5`, is a repository; `@` puts a branch, tag or commit behind it. With
`hf:` before it a name is never taken for a path, and may go on to a file: `hf:owner/name@main/checkpoint_4.pth`. The
address of a model or file at huggingface.co means the same.
"""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from minigpt4.common.errors import WeightsError, first_line

WEIGHTS = ("*.safetensors", "*.bin")
"""Files of weights, the first kind that a repository has being enough."""
BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
"""Configuration and tokenizer."""
BESIDE_ADAPTERS = ("adapter_config.json", "non_lora_trainables.bin")
"""What belongs to the adapters of a LLaVA."""
OTHERS = ("*/*", "consolidated*", "pytorch_model_fp32*")
"""The same weights again, for other programs."""
OUR_FOLDERS = ("weights", "output")
"""Where this program puts things: `weights/vicuna-7b-v1.5` that is not there is a missing folder, not a repository."""
_FILES = (".yaml", ".yml", ".json", ".pth", ".pt", ".bin", ".safetensors")
_PAGE = re.compile(
    r"https://huggingface\.co/([^/]+/[^/?]+)(?:/(?:resolve|blob|tree)/([^/?]+)(?:/([^?]+))?)?/?(?:\?.*)?"
)
"""An address there, as people copy it."""
_NAME = re.compile(r"(hf:)?([\w][\w.-]*)/([\w][\w.-]*)(?:@([\w.-]+))?(?:/(.+))?", re.ASCII)


class HubName(NamedTuple):
    """A repository, or a file in it."""

    repository: str
    revision: str | None
    file: str | None


def hub_name(value: str) -> HubName | None:
    """What a path, or the address of a page, names on the hub; None for a path."""
    if page := _PAGE.fullmatch(value):
        return HubName(*page.groups())
    found = _NAME.fullmatch(value.rstrip("/"))
    if found is None:
        return None
    prefix, owner, name, revision, file = found.groups()
    if not prefix and (file or owner in OUR_FOLDERS or name.lower().endswith(_FILES) or Path(owner).exists()):
        return None
    return HubName(f"{owner}/{name}", revision, file)


def local_path(value: str, key: str, weights: Sequence[str] = WEIGHTS) -> Path:
    """A path, `~` being the home directory; of a name on the hub that of its snapshot in the hub's cache.

    Args:
        key: for errors, such as `model.llama_model`.
        weights: kinds of weights to have there, the first that is found; none: configuration and tokenizer alone.

    WeightsError, with the key, if the hub does not give it.
    """
    name = hub_name(value)
    return Path(value).expanduser() if name is None else _fetched(value, name, key, tuple(weights))


@functools.cache
def _fetched(value: str, name: HubName, key: str, weights: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, revision, file = name
    try:
        if file and PurePosixPath(file).name.startswith("adapter_model."):
            of_run = [str(PurePosixPath(file).with_name(own)) for own in BESIDE_ADAPTERS]
            return Path(snapshot_download(repository, revision=revision, allow_patterns=[file, *of_run])) / file
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        for kinds in [[kind] for kind in weights] or [[]]:
            patterns = [*BESIDE, *kinds]
            folder = snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=OTHERS)
            if any(any(Path(folder).glob(kind)) for kind in kinds):
                break
        return Path(folder)
    except Exception as error:  # whatever hub, network and disk raise
        if os.environ.get("HF_HUB_OFFLINE") or isinstance(error, OfflineModeIsEnabled):
            way_out = f"HF_HUB_OFFLINE is set: unset it, or fetch it before with `hf download {repository}`"
        elif isinstance(error, LocalEntryNotFoundError):
            way_out = f"the hub does not answer: name a folder, or fetch it elsewhere with `hf download {repository}`"
        else:
            way_out = f"name a folder, or see https://huggingface.co/{repository}, and `hf auth login` if it is gated"
        text = f"{key}: {value} is no path here, and the Hugging Face Hub does not give it ({first_line(error)})"
        raise WeightsError(f"{text}; {way_out}") from error
