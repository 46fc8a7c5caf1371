"""Pickled LLMs become safetensors that load as the same model, whatever happens on the way."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.common.torch_files import INDEX, PICKLE, PICKLE_INDEX, SINGLE, reads_pickles
from minigpt4.models.llm import fingerprint, load_llm

SCRIPT = Path(__file__).parents[2] / "scripts/to_safetensors.py"
CPU = torch.device("cpu")
SECOND = "pytorch_model-00002-of-00002.bin"
DYING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import to_safetensors as script
rename = script.replace_durably
def rename_and_die(file, target):
    if file.name == script.INDEX:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(file, target)
script.replace_durably = rename_and_die
script.to_safetensors(Path(sys.argv[1]), Path(sys.argv[1]), shard_size="200KB")
"""


@pytest.fixture(scope="module")
def script(load_script) -> ModuleType:
    return load_script("scripts/to_safetensors.py")


@pytest.fixture
def llm(parity_dir, tmp_path) -> Callable[..., Path]:
    """A writable copy of one of the LLM directories."""
    return lambda source="vicuna_tiny": Path(shutil.copytree(parity_dir / source, tmp_path / "llm"))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("source", ["vicuna_tiny", "vicuna_tiny_sharded"])
def test_converted_llm_is_the_same_model_to_the_bit(script, llm, source):
    directory = llm(source)
    before = load_llm(directory, "fp16", CPU)
    script.to_safetensors(directory, directory, shard_size="200KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    for pickled in directory.glob("*.bin"):
        assert {file.stat().st_mode for file in directory.glob("*.safetensors")} == {pickled.stat().st_mode}
        pickled.unlink()
    after = load_llm(directory, "fp16", CPU)
    assert fingerprint(after) == fingerprint(before)
    assert same(after.state_dict(), before.state_dict())


def test_another_folder_gets_all_that_an_llm_needs_in_another_type(script, llm, tmp_path, capsys):
    directory, target = llm("vicuna_tiny_sharded"), tmp_path / "deep" / "new"
    assert script.main([str(directory), "--output", str(target), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == f"{target}: converted\n"
    kept = {path.name for path in directory.iterdir() if "pytorch_model" not in path.name}
    assert {path.name for path in target.iterdir()} == kept | {SINGLE}
    assert script.main([str(directory), "--output", str(directory / "config.json" / "new")]) == 2
    assert "config.json/new" in capsys.readouterr().err  # the disk refuses
    assert reads_pickles(directory)
    assert {tensor.dtype for tensor in tensors(target).values()} == {torch.bfloat16}
    assert fingerprint(load_llm(target, "fp32", CPU)) == fingerprint(load_llm(directory, "fp32", CPU))


@pytest.mark.parametrize("zipped", [True, False])
def test_aliases_and_integers_are_kept_also_of_old_pickles(script, llm, zipped):
    directory, block = llm(), torch.arange(12.0).reshape(3, 4)
    content = {"a": block, "tied": block, "part": block[1:], "turned": block.T, "count": torch.tensor([3])}
    torch.save(content, directory / PICKLE, _use_new_zipfile_serialization=zipped)
    script.to_safetensors(directory, directory, "bf16")
    wanted = {name: tensor if name == "count" else tensor.bfloat16() for name, tensor in content.items()}
    assert same(tensors(directory), wanted)
    assert tensors(directory)["count"].dtype == torch.int64


def test_tied_llm_stays_tied(script, llm):
    directory = llm()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    content = torch.load(directory / PICKLE)
    torch.save(content | {"lm_head.weight": content["model.embed_tokens.weight"]}, directory / PICKLE)
    before = load_llm(directory, "fp16", CPU).state_dict()
    script.to_safetensors(directory, directory)
    after = load_llm(directory, "fp16", CPU)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert same(after.state_dict(), before)


def test_conversion_that_was_killed_leaves_the_pickles_in_charge_and_is_repeated(script, llm, warm, tmp_path):
    directory = llm("vicuna_tiny_sharded")
    (tmp_path / "dying.py").write_text(DYING)
    run = warm.script(tmp_path / "dying.py", directory, SCRIPT.parent, cwd=tmp_path)
    assert run.wait() == [-signal.SIGKILL], run.text()
    assert reads_pickles(directory)
    script.to_safetensors(directory, directory, shard_size="200KB")
    assert not reads_pickles(directory)
    assert not (directory / ".converting").exists()


@pytest.mark.parametrize("index", [False, True])
def test_safetensors_that_are_there_are_not_touched(script, llm, index, capsys):
    directory = llm()
    save_file({"a": torch.zeros(1)}, directory / ("one.safetensors" if index else SINGLE))
    if index:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors"}}))
    assert script.main([str(directory)]) == 2
    assert "holds safetensors already" in capsys.readouterr().err
    assert list(tensors(directory)) == ["a"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (PICKLE_INDEX, None, "has neither pytorch_model.bin nor pytorch_model.bin.index.json"),
        (PICKLE_INDEX, b"{}", "has no readable weight_map"),
        (SECOND, None, f"{SECOND}: no such file"),
        (SECOND, b"hello", f"{SECOND}: broken"),
        (SECOND, {"epoch": 3}, f"{SECOND}: 'epoch' is a int"),
        (SECOND, {"model.embed_tokens.weight": torch.zeros(1)}, "holds 'model.embed_tokens.weight', and so does"),
        (SECOND, {"a": torch.tensor([7e4])}, "does not hold the numbers of a; take --dtype bf16"),
    ],
)
def test_directories_that_cannot_be_converted_are_named_and_stay(script, llm, capsys, file, content, message):
    directory = llm("vicuna_tiny_sharded")
    (directory / file).unlink()
    if isinstance(content, bytes):
        (directory / file).write_bytes(content)
    elif content:
        torch.save(content, directory / file)
    before = set(directory.iterdir())
    assert script.main([str(directory), "--dtype", "fp16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {directory}")
    assert message in error
    assert set(directory.iterdir()) == before
