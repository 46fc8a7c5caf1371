"""Weights files are read safely, copied strictly, and named in every refusal."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.common.checkpoint import copy_strict, drop_keys, find_weights, read_state_dict, read_weights
from minigpt4.common.errors import WeightsError

URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
NAME = "eva_vit_g.pth"
KEY = "model.vit_weights"


# Where a file is


@pytest.fixture
def places(tmp_path, monkeypatch):
    """`weights/` in an empty working directory and home, and the download cache of torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    cache = tmp_path / "torch_home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (tmp_path / "weights").mkdir()
    return Path("weights"), cache


def test_a_path_is_taken_as_it_is_and_nothing_else_in_its_place(places, tmp_path):
    (places[0] / NAME).touch()
    path = tmp_path / "mine.pth"
    path.touch()
    assert find_weights(str(path), KEY, NAME) == find_weights("~/mine.pth", KEY, NAME) == path
    with pytest.raises(WeightsError, match="model.vit_weights: there is no file models/eva_vit_g.pth.*--list"):
        find_weights("models/eva_vit_g.pth", KEY, NAME)
    with pytest.raises(WeightsError, match=f"{KEY}: {tmp_path} is a folder; name a file in it: mine.pth"):
        find_weights("~", KEY, NAME)


@pytest.mark.parametrize("value", [None, "", URL])
def test_unset_or_published_url_is_found_by_name_in_weights_or_in_the_cache(places, value):
    weights, cache = places
    with pytest.raises(WeightsError, match=f"{KEY}: {NAME} was not found .*weights/{NAME} and {cache / NAME}"):
        find_weights(value, KEY, NAME)
    for folder in (cache, weights):
        (folder / NAME).touch()
        assert find_weights(value, KEY, NAME) == folder / NAME
    assert find_weights(f"https://example.org/a/{NAME}?x=1", KEY, "other.pth") == weights / NAME


# What a file holds


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict", "module"])
def test_weights_are_found_under_the_entry_and_without_the_prefix_of_a_wrapper(tmp_path, key):
    for prefix in ("", "module.", "model.", "_orig_mod.", "module.model."):
        state = {f"{prefix}{name}": torch.arange(2.0) for name in ("llama_proj.weight", "llama_proj.bias")}
        torch.save({key: state, "epoch": 1, "hyper": {"lr": 1e-3}} if key else state, tmp_path / "w.ckpt")
        read = read_state_dict(tmp_path / "w.ckpt")
        assert list(read) == ["llama_proj.weight", "llama_proj.bias"]
        assert read["llama_proj.weight"].tolist() == [0, 1]
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.safetensors")  # not all names have it
    assert set(read_state_dict(tmp_path / "w.safetensors")) == {"module.a", "b"}


def test_published_files_are_read_with_all_entries_in_their_stored_dtype(parity_dir):
    content = read_weights(parity_dir / "train_main_checkpoint_0.pth")
    assert list(content) == ["model", "optimizer", "config", "scaler", "epoch"]
    state = read_state_dict(parity_dir / "eva_vit_tiny.pth")
    assert {(tensor.device.type, tensor.dtype) for tensor in state.values()} == {("cpu", torch.float16)}


# What is refused


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors"])
def test_truncated_empty_or_text_file_is_named_as_broken(tmp_path, name):
    path, tensors = tmp_path / name, {"a": torch.arange(5000.0), "b": torch.ones(5000)}
    with pytest.raises(WeightsError, match=f"{path}: no such file"):
        read_weights(path)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    whole = path.read_bytes()
    contents = [(whole[: int(len(whole) * share)], "broken") for share in (0.0, 0.01, 0.5, 0.99)]
    contents += [(b"<!DOCTYPE html><html></html>", "broken"), (b"version https://git-lfs\n", "a Git LFS pointer")]
    for content, what in contents:
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=f"{path}: {what}"):
            read_weights(path)


class Calls:
    """Calls something when it is unpickled."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("way", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("call", [(os.mkdir, ("ran",)), (bytearray, (3_000_000_000,))], ids=["code", "much of little"])
def test_calls_in_a_pickle_are_refused_and_not_made(tmp_path, monkeypatch, way, call):
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "evil.pth", {"epoch": 1, "config": Calls(*call)}
    if way == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(WeightsError, match=rf"{path}: refused, .* run code .*{call[0].__name__}.*only the tensors"):
        read_weights(path)
    assert not Path("ran").exists()


WEIGHT = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (torch.nn.Linear(2, 2), "refused, .*torch.nn.modules.linear.Linear"),
        ([WEIGHT], "holds a list, not a dictionary of weights"),
        ({"epoch": 3}, r"holds no tensors, but epoch \(int\)"),
        ({"net": {"a": WEIGHT}, "ema": {"a": WEIGHT}}, r"holds no tensors, but net \(dict\), ema \(dict\)"),
        ({"model": [1, 2]}, "its entry 'model' is a list, not a dictionary"),
        ({"proj": WEIGHT.to_sparse()}, ""),
        ({"proj": WEIGHT.to("meta")}, ""),
        ({"proj": torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)}, ""),
        ({"proj": torch.nested.nested_tensor([WEIGHT, WEIGHT])}, ""),
        ({"proj": torch.ones(1).expand(2, 3)}, "proj"),
        ({"proj": torch.ones(1).expand(1 << 20, 1 << 20)}, "proj"),
    ],
)
def test_file_without_plain_weights_is_refused(tmp_path, content, text):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=f"{tmp_path / 'w.pth'}: .*{text}"):
        read_state_dict(tmp_path / "w.pth")


# Copying


def test_copy_keeps_storage_and_dtype_and_fills_parameters_that_take_gradients():
    target = {"a": torch.zeros(3, dtype=torch.float16), "b": torch.nn.Parameter(torch.zeros(2))}
    storage = target["a"].data_ptr()
    copy_strict(target, {"a": torch.arange(3.0), "b": torch.ones(2)}, source="w.pth")
    assert (target["a"].tolist(), target["b"].tolist()) == ([0, 1, 2], [1, 1])
    assert (target["a"].data_ptr(), target["a"].dtype, target["b"].is_leaf) == (storage, torch.float16, True)


def test_all_differences_are_told_at_once_and_nothing_is_copied():
    target = {"a": torch.zeros(2), "b": torch.zeros(2), **{f"n{index:02}": torch.zeros(1) for index in range(12)}}
    state = {"a": torch.ones(2), "b": torch.ones(3), "d": torch.ones(1)}
    with pytest.raises(WeightsError) as error:
        copy_strict(target, state, source="w.pth", hint="Try another.")
    assert str(error.value).splitlines() == [
        "w.pth does not fit the model.",
        "  missing: n00, n01, n02, n03, n04, n05, n06, n07 and 4 more",
        "  not expected: d",
        "  wrong shape: b is (3,) in the file, (2,) in the model",
        "  Try another.",
    ]
    assert target["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        (WEIGHT.bool(), "wrong type: proj is torch.bool"),
        (WEIGHT.long(), "wrong type: proj is torch.int64"),
        (WEIGHT.to(torch.complex64), "wrong type: proj is torch.complex64"),
        (WEIGHT[None], r"wrong shape: proj is \(1, 2, 3\)"),
        (WEIGHT * float("nan"), "NaN, infinity or numbers beyond the model's type in proj"),
        (WEIGHT * float("-inf"), "in proj"),
        (WEIGHT * 7e4, "in proj"),  # of fp16
    ],
)
def test_numbers_that_cannot_be_weights_are_refused_and_nothing_is_copied(odd, text):
    target = {"bias": torch.zeros(1), "proj": torch.zeros(2, 3, dtype=torch.float16)}
    with pytest.raises(WeightsError, match=f"w.pth(?s:.*){text}"):
        copy_strict(target, {"bias": torch.ones(1), "proj": odd}, source="w.pth")
    assert not target["bias"].any()


def test_empty_tensors_are_told_from_others_of_wrong_shape():
    for size, told in ((0, True), (1, False)):
        with pytest.raises(WeightsError, match="wrong shape") as error:
            copy_strict({"a": torch.ones(3)}, {"a": torch.ones(size)}, source="w.pth")
        assert ("ZeRO-3" in str(error.value)) == told


def test_drop_keys_takes_shell_patterns_and_minds_the_case():
    state = dict.fromkeys(("t5_proj.weight", "T5_proj.bias", "query_tokens"), torch.ones(1))
    assert list(drop_keys(state, ["t5_*", "query"])) == ["T5_proj.bias", "query_tokens"]
    assert drop_keys(state, []) == state
