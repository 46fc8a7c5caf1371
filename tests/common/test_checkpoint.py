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
    """An empty working directory and an empty download cache of torch; returns where files may lie in them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    return {"weights": Path("weights"), "cache": tmp_path / "torch_home" / "hub" / "checkpoints"}


def put(directory: Path, name: str = NAME) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_bytes(b"weights")
    return path


def test_a_path_is_taken_as_it_is(tmp_path):
    path = put(tmp_path, "mine.pth")
    assert find_weights(str(path), KEY, NAME) == path


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = put(tmp_path, "mine.pth")
    assert find_weights("~/mine.pth", KEY, NAME) == path


def test_a_path_without_file_is_refused_by_its_key(places):
    put(places["weights"])  # another place is no substitute for a path that was asked for
    with pytest.raises(WeightsError) as error:
        find_weights("models/eva_vit_g.pth", KEY, NAME)
    assert str(error.value).startswith("model.vit_weights: there is no file models/eva_vit_g.pth. ")
    assert "python scripts/download_weights.py --list" in str(error.value)


@pytest.mark.parametrize("value", [None, "", URL])
@pytest.mark.parametrize("place", ["weights", "cache"])
def test_unset_or_published_url_is_found_by_name(places, value, place):
    path = put(places[place])
    assert find_weights(value, KEY, NAME) == path


def test_weights_directory_comes_before_the_cache(places):
    put(places["cache"])
    path = put(places["weights"])
    assert find_weights(None, KEY, NAME) == path


def test_url_of_another_file_is_found_by_its_own_name(places):
    put(places["weights"])
    other = put(places["cache"], "blip2_pretrained_flant5xl.pth")
    assert find_weights("https://example.org/a/blip2_pretrained_flant5xl.pth?x=1", KEY, NAME) == other


@pytest.mark.parametrize("value", [None, URL])
def test_file_in_no_place_names_both_places_and_the_key(places, value):
    with pytest.raises(WeightsError) as error:
        find_weights(value, KEY, NAME)
    text = str(error.value)
    assert f"model.vit_weights: {NAME} was not found" in text
    assert f"looked for weights/{NAME} and {places['cache'] / NAME}" in text
    assert "set model.vit_weights to it" in text


# What a file holds


@pytest.mark.parametrize("wrapped", [False, True])
def test_state_is_the_model_entry_or_the_file_itself(tmp_path, wrapped):
    state = {"a.weight": torch.arange(3.0)}
    torch.save({"model": state, "epoch": 1, "scaler": None} if wrapped else state, tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth")
    assert list(read) == ["a.weight"]
    assert torch.equal(read["a.weight"], state["a.weight"])


def test_safetensors_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "w.safetensors")["a"], torch.ones(2))


def test_whole_checkpoint_of_the_reference_is_read(parity_dir):
    content = read_weights(parity_dir / "train_main_checkpoint_0.pth")
    assert list(content) == ["model", "optimizer", "config", "scaler", "epoch"]
    assert content["epoch"] == 0


def test_tensors_are_on_the_cpu_in_their_stored_dtype(parity_dir):
    state = read_state_dict(parity_dir / "eva_vit_tiny.pth")
    assert {(tensor.device.type, tensor.dtype) for tensor in state.values()} == {("cpu", torch.float16)}


def test_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError) as error:
        read_weights(tmp_path / "none.pth")
    assert str(error.value) == f"{tmp_path / 'none.pth'}: no such file"


def save_some(path: Path) -> Path:
    tensors = {"a": torch.arange(5000.0), "b": torch.ones(5000)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_or_empty_file_is_named_as_broken(tmp_path, name, share):
    path = save_some(tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path}: broken")
    assert str(error.value).endswith("Get it again.")


@pytest.mark.parametrize("content", ["<!DOCTYPE html><html>Not Found</html>", "hello", "version https://git-lfs\n"])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_text_file_under_the_name_of_weights_is_named_as_broken(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path}: broken")


class MakesDirectory:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, plain_pickle):
    path, content = tmp_path / "evil.pth", {"epoch": 1, "config": MakesDirectory(tmp_path / "ran")}
    path.write_bytes(pickle.dumps(content, protocol=2)) if plain_pickle else torch.save(content, path)
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    text = str(error.value)
    assert f"{path}: refused, the pickle asks to run code" in text
    assert "mkdir" in text
    assert "save only the tensors" in text
    assert not (tmp_path / "ran").exists()


def test_whole_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"refused, .* \(torch.nn.modules.linear.Linear\)"):
        read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([torch.ones(1)], "holds a list, not a dictionary of weights"),
        ({"epoch": 3}, "holds no tensors; it holds epoch (int)"),
        ({"net": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, "holds no tensors of its own, but in net, ema"),
        ({"model": [1, 2]}, "its entry 'model' is a list, not a dictionary"),
    ],
)
def test_file_without_weights_is_refused(tmp_path, content, text):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as error:
        read_state_dict(tmp_path / "w.pth")
    assert str(error.value).startswith(f"{tmp_path / 'w.pth'}: {text}")


# Copying


def test_copy_keeps_the_storage_and_dtype_of_the_target():
    target = {"a": torch.zeros(3, dtype=torch.float16)}
    storage = target["a"].data_ptr()
    copy_strict(target, {"a": torch.arange(3.0)}, source="w.pth")
    assert target["a"].tolist() == [0, 1, 2]
    assert (target["a"].data_ptr(), target["a"].dtype) == (storage, torch.float16)


def test_copy_fills_parameters_that_take_gradients():
    parameter = torch.nn.Parameter(torch.zeros(2))
    copy_strict({"a": parameter}, {"a": torch.ones(2)}, source="w.pth")
    assert parameter.tolist() == [1, 1]
    assert parameter.is_leaf


def test_all_differences_are_told_at_once_and_nothing_is_copied():
    target = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    state = {"a": torch.ones(2), "b": torch.ones(3), "d": torch.ones(1)}
    with pytest.raises(WeightsError) as error:
        copy_strict(target, state, source="w.pth", hint="Try another.")
    assert str(error.value).splitlines() == [
        "w.pth does not fit the model.",
        "  missing: c",
        "  not expected: d",
        "  wrong shape: b is (3,) in the file, (2,) in the model",
        "  Try another.",
    ]
    assert target["a"].tolist() == [0, 0]


def test_long_lists_of_names_are_cut_and_counted():
    with pytest.raises(WeightsError, match="missing: n00, n01, n02, n03, n04, n05, n06, n07 and 4 more"):
        copy_strict({f"n{index:02}": torch.zeros(1) for index in range(12)}, {}, source="w.pth")


def test_drop_keys_takes_shell_patterns_and_minds_the_case():
    state = dict.fromkeys(("t5_proj.weight", "T5_proj.bias", "query_tokens"), torch.ones(1))
    assert list(drop_keys(state, ["t5_*", "query"])) == ["T5_proj.bias", "query_tokens"]
    assert drop_keys(state, []) == state


# What other programs write


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module.model."])
def test_weights_are_found_under_the_entry_and_without_the_prefix_of_a_wrapper(tmp_path, key, prefix):
    state = {f"{prefix}{name}": torch.ones(2) for name in ("llama_proj.weight", "llama_proj.bias")}
    torch.save({key: state, "epoch": 1, "hyper_parameters": {"lr": 1e-3}}, tmp_path / "w.ckpt")
    assert list(read_state_dict(tmp_path / "w.ckpt")) == ["llama_proj.weight", "llama_proj.bias"]


def test_a_prefix_that_not_all_names_have_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert list(read_state_dict(tmp_path / "w.pth")) == ["module.a", "b"]


# What cannot be weights

WEIGHT = torch.ones(2, 3)


@pytest.mark.parametrize(
    "odd",
    [
        WEIGHT.to_sparse(),
        WEIGHT.to("meta"),
        torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([WEIGHT, WEIGHT]),
        torch.ones(1).expand(2, 3),
        torch.ones(1).expand(1 << 20, 1 << 20),
    ],
    ids=["sparse", "meta", "quantised", "nested", "expanded", "expanded to 4 TB"],
)
def test_tensors_that_are_no_plain_ones_are_refused(tmp_path, odd):
    torch.save({"proj": odd}, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as error:
        read_state_dict(tmp_path / "w.pth")
    assert str(error.value).startswith(f"{tmp_path / 'w.pth'}: ")


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        (WEIGHT.bool(), "wrong type: proj is torch.bool"),
        (WEIGHT.long(), "wrong type: proj is torch.int64"),
        (WEIGHT.to(torch.complex64), "wrong type: proj is torch.complex64"),
        (WEIGHT[None], r"wrong shape: proj is \(1, 2, 3\)"),
        (WEIGHT * float("nan"), "NaN, infinity or numbers beyond the model's type in proj"),
        (WEIGHT * float("-inf"), "in proj"),
        (WEIGHT * 1e39, "in proj"),
    ],
)
def test_numbers_that_cannot_be_weights_are_refused_and_nothing_is_copied(odd, text):
    target = {"bias": torch.zeros(1), "proj": torch.zeros(2, 3)}
    with pytest.raises(WeightsError, match=f"w.pth(?s:.*){text}"):
        copy_strict(target, {"bias": torch.ones(1), "proj": odd}, source="w.pth")
    assert not target["bias"].any()


def test_numbers_that_the_models_half_precision_does_not_hold_are_refused():
    with pytest.raises(WeightsError, match="a.pth: .* proj"):
        copy_strict({"proj": torch.zeros(1, dtype=torch.float16)}, {"proj": torch.tensor([7e4])}, source="a.pth")
