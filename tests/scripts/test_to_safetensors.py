"""`scripts/to_safetensors.py` as a user runs it; what it does is tested in tests/common/test_llm_conversion.py."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "scripts/to_safetensors.py"


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_directory_is_converted_in_place_and_once(parity_dir, tmp_path):
    directory = Path(shutil.copytree(parity_dir / "vicuna_tiny_sharded", tmp_path / "llm"))
    first, second = run(directory, "--dtype", "bf16"), run(directory, "--dtype", "bf16")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert first.stdout == f"{directory}: 2 files written, 0.0 GB\n"
    assert second.stdout == f"{directory}: nothing to do\n"
    assert {tensor.dtype for tensor in load_file(directory / "model-00001.safetensors").values()} == {torch.bfloat16}


def test_error_is_one_line(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}: has neither pytorch_model.bin nor ")
    assert result.stderr.count("\n") == 1
