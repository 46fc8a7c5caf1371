"""The LLM directory loads whole and frozen, or is refused with the reason and the file."""

import json
import logging
import math
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from minigpt4.common.errors import WeightsError
from minigpt4.models.base_model import DTYPES
from minigpt4.models.llm import SANITY_SENTENCE, cache_arguments, check_llm, load_llm, set_token_ids
from minigpt4.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def load(directory, precision="fp32", **options):
    return load_llm(directory, precision, CPU, **options)


def refusal(directory) -> str:
    """What `load_llm` says about a directory that it does not take."""
    with pytest.raises(WeightsError) as error:
        load(directory)
    return str(error.value)


# Loading


def test_all_three_formats_hold_the_same_weights_and_pickles_are_told_how_to_be_converted(parity_dir, caplog):
    expected = load(parity_dir / "vicuna_tiny_safetensors").state_dict()
    for name, said in (("vicuna_tiny_safetensors", 0), ("vicuna_tiny", 1), ("vicuna_tiny_sharded", 1)):
        with caplog.at_level(logging.INFO, logger="minigpt4.models.llm"):
            found = load(parity_dir / name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert caplog.text.count(f"python scripts/to_safetensors.py {parity_dir / name}\x20") == said


def mapped_file(tensor) -> str:
    """The file, if any, that the memory of a tensor is a part of."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.partition("/")[2].rpartition("/")[2]
    return ""


@pytest.mark.parametrize(("precision", "file"), [("fp16", "model.safetensors"), ("bf16", ""), ("fp32", "")])
def test_weights_have_the_type_asked_for_and_are_not_copied_if_it_is_theirs(parity_dir, precision, file):
    model = load(parity_dir / "vicuna_tiny_safetensors", precision)
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[precision]}
    assert {mapped_file(parameter) for parameter in model.parameters()} == {file}


def test_generation_ids_are_those_of_the_tokenizer_and_not_of_config_json(parity_dir, golden):
    directory = parity_dir / "vicuna_tiny"
    raw, model = json.loads((directory / "config.json").read_text()), load(directory)
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (0, 1, -1)
    set_token_ids(model, load_tokenizer(directory))
    expected = golden["generate"]["generation_config"]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert {name: getattr(model.generation_config, name) for name in names} == {name: expected[name] for name in names}


def test_several_end_tokens_of_a_chat_model_all_count(llm_copy):
    directory = llm_copy()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17], "temperature": 0.2}))
    model, tokenizer = load(directory), load_tokenizer(directory)
    set_token_ids(model, tokenizer)
    assert model.generation_config.eos_token_id == [2, 17]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.temperature != 0.2


# Directories that are no LLM


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "has no config.json"),
        ("{not json", "config.json: "),
        ({"model_type": "no_such_model"}, "config.json: "),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"intermediate_size": 10**6}, "config.json describes more than"),
        ({"quantization_config": {"quant_method": "gptq"}}, "(gptq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "model.llm_precision: int8 or nf4"),
    ],
    ids=str,
)
def test_config_that_is_no_llms_is_refused(llm_copy, change_json, content, text):
    directory = llm_copy()
    if content is None:
        (directory / "config.json").unlink()
    elif isinstance(content, str):
        (directory / "config.json").write_text(content)
    else:
        change_json(directory / "config.json", **content)
    assert f"model.llama_model: {directory}" in (said := refusal(directory))
    assert text in said


def test_other_directories_are_refused(llm_copy, tmp_path):
    assert f"model.llama_model: {tmp_path / 'vicuna'} is not a directory" in refusal(tmp_path / "vicuna")
    (llm_copy() / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    assert "adapter_config.json" in refusal(tmp_path / "llm")


def test_broken_shard_is_named(llm_copy):
    file = llm_copy("vicuna_tiny_sharded") / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:1000])
    text = refusal(file.parent)
    assert f"model.llama_model: {file}: broken" in text
    assert text.endswith("Get it again.")


class MakesDirectory:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_code_in_a_pickle_does_not_run(llm_copy, tmp_path, save):
    directory = llm_copy()
    save({"model.norm.weight": MakesDirectory(tmp_path / "ran")}, directory / "pytorch_model.bin")
    text = refusal(directory)
    assert f"model.llama_model: {directory / 'pytorch_model.bin'}: refused, the pickle asks to run code" in text
    assert "mkdir" in text
    assert not (tmp_path / "ran").exists()


def test_old_rotary_tables_and_the_name_of_the_delta_in_the_files_are_no_fault(changed_llm, change_json):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    directory = changed_llm(lambda tensors: tensors.update({name: torch.zeros(12)}))
    change_json(directory / "config.json", _name_or_path="lmsys/vicuna-7b-delta-v1.1")  # of a merged model
    load(directory)


@pytest.mark.parametrize(("value", "loss"), [(0.0, f"{math.log(513):.3f}"), (float("nan"), "nan")])
def test_weights_without_information_fail_on_the_sanity_sentence_unless_it_is_off(
    changed_llm, build_model, value, loss
):
    directory = changed_llm(lambda tensors: {name: torch.full_like(tensor, value) for name, tensor in tensors.items()})
    with pytest.raises(WeightsError) as error:
        build_model(llama_model=str(directory))
    text = str(error.value)
    assert f"model.llama_model: {directory} cannot be right" in text
    assert f"loss on an English sentence is {loss}, a uniform guess has {math.log(513):.3f}" in text
    build_model(llama_model=str(directory), llm_sanity_check=False)


def test_loss_far_above_that_of_a_trained_llm_is_warned_of_until_it_knows_english(parity_dir, caplog):
    directory = parity_dir / "vicuna_tiny"
    model, tokenizer = load(directory), load_tokenizer(directory)
    loss = check_llm(model, tokenizer, directory)
    assert f"reads English with a loss of {loss:.2f} (a uniform guess has 6.24)" in caplog.text
    caplog.clear()
    ids = tokenizer(SANITY_SENTENCE, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam(model.requires_grad_().parameters(), 1e-2)
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert check_llm(model, tokenizer, directory) < 2
    assert not caplog.text


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_keys_and_values_go_to_the_argument_that_this_transformers_knows(name):
    namespace = {"nn": torch.nn}
    exec(f"class Llm(nn.Module):\n    def forward(self, input_ids, {name}=None): ...", namespace)
    cache = DynamicCache()
    assert cache_arguments(namespace["Llm"](), cache) == {"use_cache": True, name: cache}


def test_decoding_uses_no_name_that_transformers_is_about_to_drop(model, pool):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(pool[:1], ["<Img><ImageHere></Img> What?"], max_new_tokens=2)
        model.generate(pool[:1], ["<Img><ImageHere></Img> What?"], max_new_tokens=2, num_beams=2)


# What is not read, and whose code does not run

CODE_OF_MODEL = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
CODE_OF_TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
AUTO_MAP = {
    "config.json of an unknown type": {"config.json": CODE_OF_MODEL | {"model_type": "evil"}},
    "config.json of LLaMA": {"config.json": CODE_OF_MODEL},
    "tokenizer_config.json": {"tokenizer_config.json": CODE_OF_TOKENIZER | {"tokenizer_class": "Evil"}},
    "tokenizer_config.json of LLaMA": {"tokenizer_config.json": CODE_OF_TOKENIZER},
}


@pytest.mark.parametrize("case", AUTO_MAP)
@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "tokenizer.json"])
def test_code_of_a_directory_never_runs_and_is_never_asked_about(llm_copy, change_json, monkeypatch, case, tokenizer):
    directory, asked = llm_copy(), []
    (directory / "evil.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nclass Evil: pass\n")
    if tokenizer == "tokenizer.json":
        (directory / "tokenizer.model").unlink()
        shutil.copy(Path(__file__).parents[1] / "data/llama_tokenizers/tokenizer_v4.json", directory / tokenizer)
    for name, changes in AUTO_MAP[case].items():
        change_json(directory / name, **changes)
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    try:
        load_tokenizer(directory)
        load(directory)
        said = "loaded"
    except WeightsError as error:
        said = str(error).partition("\n")[0]
    assert not asked
    assert not (directory / "ran").exists()
    if "LLaMA" in case:
        assert said == "loaded"
    else:
        assert said.startswith(f"{'model.llama_model: ' if 'unknown' in case else ''}{directory}")
        assert "auto_map" in said


def test_pickle_that_would_grow_in_memory_is_refused(llm_copy):
    path = llm_copy() / "pytorch_model.bin"
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(path.with_name("new"), "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    path.with_name("new").replace(path)
    assert str(path) in refusal(path.parent)


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_norms_that_are_stored_as_differences_from_one_are_no_delta(kind, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=2, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_config(config)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert max(p.abs().max() for p in norms) < 0.02
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.model_type == kind
