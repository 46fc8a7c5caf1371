"""`scripts/to_safetensors.py` as a user runs it; what it does is tested in tests/common/test_llm_conversion.py."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "scripts/to_safetensors.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("to_safetensors", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_directory_is_converted_in_place_and_once(main, parity_dir, tmp_path, capsys):
    directory = Path(shutil.copytree(parity_dir / "vicuna_tiny_sharded", tmp_path / "llm"))
    command = [str(directory), "--dtype", "bf16"]
    assert (main(command), main(command)) == (0, 0)
    assert capsys.readouterr().out == f"{directory}: 2 files written, 0.0 GB\n{directory}: nothing to do\n"
    assert {tensor.dtype for tensor in load_file(directory / "model-00001.safetensors").values()} == {torch.bfloat16}


def test_error_is_one_line(main, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: has neither pytorch_model.bin nor ")
    assert error.count("\n") == 1


def test_help_says_how_to_run_it(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "python scripts/to_safetensors.py weights/vicuna-7b" in capsys.readouterr().out
