"""Pickled LLMs become safetensors that load as the same model, whatever happens on the way."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minigpt4.common.errors import WeightsError
from minigpt4.common.torch_files import INDEX, PICKLE, reads_pickles
from minigpt4.models.llm import fingerprint, load_llm

SCRIPT = Path(__file__).parents[2] / "scripts/to_safetensors.py"
spec = importlib.util.spec_from_file_location("to_safetensors", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
main, to_safetensors = script.main, script.to_safetensors

CPU = torch.device("cpu")
SECOND = "pytorch_model-00002-of-00002.bin"
KILLED_AFTER_ONE_SHARD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import to_safetensors as script
script.SHARD_BYTES = 200_000
save, calls = script.save_file, []
def save_and_die(tensors, part, **more):
    calls.append(part)
    if len(calls) == 2:
        Path(part).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, part, **more)
script.save_file = save_and_die
script.to_safetensors(Path(sys.argv[1]))
"""


@pytest.fixture
def llm(parity_dir, tmp_path) -> Callable[..., Path]:
    """A writable copy of one of the LLM directories."""

    def copy(source: str = "vicuna_tiny") -> Path:
        return Path(shutil.copytree(parity_dir / source, tmp_path / "llm"))

    return copy


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(script, "SHARD_BYTES", 200_000)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("source", ["vicuna_tiny", "vicuna_tiny_sharded"])
def test_converted_llm_is_the_same_model_to_the_bit(llm, source, small_shards):
    directory = llm(source)
    before = load_llm(directory, "fp16", CPU)
    written = to_safetensors(directory)
    assert len(written) > 2
    for pickled in directory.glob("*.bin"):
        pickled.unlink()
    after = load_llm(directory, "fp16", CPU)
    assert fingerprint(after) == fingerprint(before)
    assert same(after.state_dict(), before.state_dict())


def test_another_folder_gets_all_that_an_llm_needs(llm, tmp_path):
    directory = llm("vicuna_tiny_sharded")
    to_safetensors(directory, tmp_path / "deep" / "new")
    kept = {path.name for path in directory.iterdir() if "pytorch_model" not in path.name}
    assert {path.name for path in (tmp_path / "deep" / "new").iterdir()} == kept | {
        "model-00001.safetensors",
        INDEX,
    } | {"model-00002.safetensors"}
    assert reads_pickles(directory)
    assert fingerprint(load_llm(tmp_path / "deep" / "new", "fp32", CPU)) == fingerprint(
        load_llm(directory, "fp32", CPU)
    )


def test_new_files_are_as_readable_as_others(llm):
    (shard,) = to_safetensors(llm())
    assert shard.stat().st_mode == (shard.parent / INDEX).stat().st_mode


def test_other_type_is_for_floating_point_tensors_only(llm):
    directory = llm()
    content = torch.load(directory / PICKLE)
    torch.save(content | {"count": torch.tensor([3])}, directory / PICKLE)
    to_safetensors(directory, dtype="bf16")
    found = tensors(directory)
    assert found.pop("count").dtype == torch.int64
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert same(found, {name: tensor.bfloat16() for name, tensor in content.items()})


def test_numbers_that_fp16_does_not_hold_are_refused(llm):
    directory = llm()
    torch.save({"a.weight": torch.tensor([70000.0])}, directory / PICKLE)
    with pytest.raises(WeightsError, match=r"a\.weight: .*--dtype bf16"):
        to_safetensors(directory, dtype="fp16")
    assert reads_pickles(directory)


def test_tensors_that_share_memory_are_written_one_by_one(llm):
    directory = llm()
    block = torch.arange(12.0).reshape(3, 4)
    content = {"a": block, "tied": block, "part": block[1:], "turned": block.T}
    torch.save(content, directory / PICKLE)
    to_safetensors(directory)
    assert same(tensors(directory), content)


def test_tied_llm_stays_tied(llm):
    directory = llm()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    content = torch.load(directory / PICKLE)
    torch.save(content | {"lm_head.weight": content["model.embed_tokens.weight"]}, directory / PICKLE)
    before = load_llm(directory, "fp16", CPU).state_dict()
    to_safetensors(directory)
    after = load_llm(directory, "fp16", CPU)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert same(after.state_dict(), before)


def test_old_pickles_that_cannot_be_mapped_are_converted(llm):
    directory = llm()
    content = torch.load(directory / PICKLE)
    torch.save(content, directory / PICKLE, _use_new_zipfile_serialization=False)
    to_safetensors(directory)
    assert same(tensors(directory), content)


def test_second_conversion_writes_nothing(llm, small_shards):
    directory = llm()
    to_safetensors(directory)
    before = times(directory)
    assert to_safetensors(directory) == []
    assert times(directory) == before


def test_conversion_that_was_killed_leaves_the_pickles_in_charge_and_goes_on(llm, small_shards):
    directory = llm("vicuna_tiny_sharded")
    result = subprocess.run([sys.executable, "-c", KILLED_AFTER_ONE_SHARD, str(directory), str(SCRIPT.parent)])
    assert result.returncode == -signal.SIGKILL
    assert reads_pickles(directory)
    first = times(directory)
    assert list(first) == ["model-00001.safetensors"]
    written = to_safetensors(directory)
    assert times(directory).items() > first.items()
    assert "model-00001.safetensors" not in {path.name for path in written}
    assert not list(directory.glob("*.part"))


def test_shard_that_was_cut_off_is_written_again(llm, small_shards):
    directory = llm()
    first, *_ = to_safetensors(directory)
    first.write_bytes(first.read_bytes()[:-10])
    assert to_safetensors(directory) == [first]
    assert same(tensors(directory), torch.load(directory / PICKLE))


def test_pickles_that_changed_are_converted_anew(llm, small_shards):
    directory = llm()
    count = len(to_safetensors(directory))
    content = {name: tensor + 1 for name, tensor in torch.load(directory / PICKLE).items()}
    torch.save(content, directory / PICKLE)
    assert len(to_safetensors(directory)) == count
    assert same(tensors(directory), content)


def test_shards_of_an_earlier_conversion_do_not_stay(llm, monkeypatch, small_shards):
    directory = llm()
    many = len(to_safetensors(directory))
    monkeypatch.setattr(script, "SHARD_BYTES", 1 << 30)
    to_safetensors(directory, dtype="bf16")
    assert many > len(list(directory.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_safetensors_of_others_are_not_touched(llm, name):
    directory = llm()
    save_file({"a": torch.zeros(1)}, directory / name)
    if name != "model.safetensors":
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="holds safetensors already"):
        to_safetensors(directory)
    with safe_open(directory / name, "pt") as file:
        assert list(file.keys()) == ["a"]


# Directories that cannot be converted


def refusal(directory: Path) -> str:
    with pytest.raises(WeightsError) as error:
        to_safetensors(directory)
    return str(error.value)


def test_directories_without_pickles_are_named(llm, tmp_path):
    assert refusal(tmp_path / "no") == f"{tmp_path / 'no'}: no such directory"
    directory = llm("vicuna_tiny_safetensors")
    (directory / "model.safetensors").unlink()
    assert "has neither pytorch_model.bin nor pytorch_model.bin.index.json" in refusal(directory)


def test_missing_and_broken_pickles_are_named(llm):
    directory = llm("vicuna_tiny_sharded")
    (directory / SECOND).write_bytes(b"hello")
    assert f"{directory / SECOND}: broken" in refusal(directory)
    (directory / SECOND).unlink()
    assert f"names files that are not there: {SECOND}" in refusal(directory)
    (directory / "pytorch_model.bin.index.json").write_text("{}")
    assert "has no readable weight_map" in refusal(directory)


def test_entries_that_are_no_tensors_or_come_twice_are_named(llm):
    directory = llm("vicuna_tiny_sharded")
    torch.save({"epoch": 3}, directory / SECOND)
    assert f"{directory / SECOND}: its entry 'epoch' is a int" in refusal(directory)
    torch.save({"model.embed_tokens.weight": torch.zeros(1)}, directory / SECOND)
    assert "holds 'model.embed_tokens.weight', and so does" in refusal(directory)


def test_disk_that_refuses_is_named(llm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="file/new: cannot be written: .*start again to go on"):
        to_safetensors(llm(), tmp_path / "file" / "new")


# The command


def test_directory_is_converted_in_place_and_once(parity_dir, tmp_path, capsys):
    directory = Path(shutil.copytree(parity_dir / "vicuna_tiny_sharded", tmp_path / "llm"))
    command = [str(directory), "--dtype", "bf16"]
    assert (main(command), main(command)) == (0, 0)
    assert capsys.readouterr().out == f"{directory}: 2 files written, 0.0 GB\n{directory}: nothing to do\n"
    assert {tensor.dtype for tensor in load_file(directory / "model-00001.safetensors").values()} == {torch.bfloat16}


def test_error_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: has neither pytorch_model.bin nor ")
    assert error.count("\n") == 1


def test_help_says_how_to_run_it(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "python scripts/to_safetensors.py weights/vicuna-7b" in capsys.readouterr().out
