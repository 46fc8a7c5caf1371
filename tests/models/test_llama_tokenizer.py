"""LLaMA directories in all forms that people have give the ids and texts of the slow tokenizer of transformers 4.30."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from minigpt4.common.errors import WeightsError
from minigpt4.models.generation import Decoding, generate_ids
from minigpt4.models.tokenizer import load_tokenizer, start_ids

DATA = Path(__file__).parent.parent / "data" / "llama_tokenizers"
CASES = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
BLOCKS = ("a", "dog ", "  ", "\n", "$$", "#", "###", "</s>", "<s>", "<unk>", "é", "日", "😀", "▁", "[INST]", "1", "\t")


@pytest.fixture
def make_directory(tmp_path, parity_dir):
    """`make_directory(files, model)`: an LLM directory with these JSON files and this SentencePiece model."""

    def make(files: dict, model: Path | None = parity_dir / "vicuna_tiny" / "tokenizer.model") -> Path:
        directory = tmp_path / f"llm{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        shutil.copy(parity_dir / "vicuna_tiny" / "config.json", directory)
        if model is not None:
            shutil.copy(model, directory / "tokenizer.model")
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content), encoding="utf-8")
        return directory

    return make


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_every_form_meets_the_reference(case, make_directory):
    directory = make_directory(case["files"], *([DATA / case["model"]] if case["model"] else []))
    tokenizer = load_tokenizer(directory)
    assert {key: getattr(tokenizer, f"{key}_token_id") for key in case["ids"]} == case["ids"]
    for text, plain, special in case["encode"]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain, text
        assert tokenizer(text)["input_ids"] == special, text
    for ids, kept, skipped in case["decode"]:
        assert tokenizer.decode(ids) == kept, ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == skipped, ids
    assert start_ids(tokenizer) == case["encode"][0][2]


@pytest.mark.parametrize(
    "form", ["transformers 4", "transformers 5", "transformers 5, of tokenizer.model", "no config"]
)
def test_tokenizer_json_alone_gives_the_ids_of_tokenizer_model(form, make_directory, parity_dir, golden):
    source = make_directory({}) if "of tokenizer.model" in form else parity_dir / "vicuna_tiny"
    directory = make_directory({}, None)
    if form == "transformers 4":
        shutil.copy(DATA / "tokenizer_v4.json", directory / "tokenizer.json")
    else:
        AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    if form == "no config":
        (directory / "tokenizer_config.json").unlink()
    tokenizer, whole = load_tokenizer(directory), load_tokenizer(parity_dir / "vicuna_tiny")
    for case in golden["tokenizer"]["cases"]:
        assert tokenizer(case["text"])["input_ids"] == case["ids_special"]
    for case in golden["tokenizer"]["decode"]:
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["skip_special"]
    chance = random.Random(0)
    texts = ["".join(chance.choices(BLOCKS, k=20)) for _ in range(500)]
    assert tokenizer(texts)["input_ids"] == whole(texts)["input_ids"]


def test_token_known_to_transformers_5_alone_keeps_the_blanks_beside_it(make_directory):
    listed = {"512": {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}}
    tokenizer = load_tokenizer(make_directory({"tokenizer_config.json": {"added_tokens_decoder": listed}}))
    ids = tokenizer("a <|im_end|>\nb", add_special_tokens=False)["input_ids"]
    assert 512 in ids
    assert len(ids) > len(tokenizer("a<|im_end|>b", add_special_tokens=False)["input_ids"])


def test_token_past_the_embeddings_is_plain_text_with_a_warning(make_directory, caplog):
    tokenizer = load_tokenizer(make_directory({"added_tokens.json": {"<pad>": 513}}))
    assert max(tokenizer("a<pad>b")["input_ids"]) < 512
    assert "<pad>" in caplog.text


def test_chat_template_is_read_from_its_file_and_from_the_configuration(make_directory):
    config = {"chat_template": [{"name": "default", "template": "{{ messages[0].content }}!"}]}
    directory = make_directory({"tokenizer_config.json": config})
    chat = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(directory).apply_chat_template(chat, tokenize=False) == "hi!"
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}?")
    assert load_tokenizer(directory).apply_chat_template(chat, tokenize=False) == "hi?"


REFUSED = {
    "bos_token": {"tokenizer_config.json": {"bos_token": None}},
    "eos_token": {"tokenizer_config.json": {"eos_token": "<end>"}, "added_tokens.json": {"<end>": 600}},
    "tokenizer_config.json": {"tokenizer_config.json": ["a"]},
    "special_tokens_map.json": {"special_tokens_map.json": {"bos_token": [1]}},
    "added_tokens.json": {"added_tokens.json": {"<end>": 17}},
    "added_tokens_decoder": {"tokenizer_config.json": {"added_tokens_decoder": {"a": {"content": "<end>"}}}},
    "sp_model_kwargs": {"tokenizer_config.json": {"sp_model_kwargs": {"add_bos": True}}},
    'bos_token is ""': {"tokenizer_config.json": {"bos_token": ""}},
    "additional_special_tokens": {"tokenizer_config.json": {"additional_special_tokens": "abc"}},
    "elsewhere": {
        "tokenizer_config.json": {"added_tokens_decoder": {"512": {"content": "<end>"}}},
        "added_tokens.json": {"<end>": 511 + 3},
    },
}


@pytest.mark.parametrize("named", REFUSED)
def test_files_that_cannot_be_read_exactly_are_refused_by_name(named, make_directory):
    directory = make_directory(REFUSED[named])
    with pytest.raises(WeightsError) as error:
        load_tokenizer(directory)
    assert str(directory) in str(error.value)
    assert named in str(error.value)


def test_tokenizer_json_changes_nothing_beside_tokenizer_model(make_directory):
    content = json.loads((DATA / "tokenizer_v4.json").read_text(encoding="utf-8"))
    files = {"tokenizer_config.json": {"eos_token": "."}}
    alone, both = (load_tokenizer(make_directory(files | more)) for more in ({}, {"tokenizer.json": content}))
    assert "</s>" in content["added_tokens"][2].values()
    for text in (" </s>", "a </s> b", "x."):
        assert both(text)["input_ids"] == alone(text)["input_ids"]


def test_end_token_that_tokenizer_json_alone_puts_behind_texts_stays_there(make_directory, parity_dir):
    directory = make_directory({}, None)
    tokenizer = AutoTokenizer.from_pretrained(parity_dir / "vicuna_tiny", add_eos_token=True)
    tokenizer.save_pretrained(directory)
    assert tokenizer("a")["input_ids"][-1] == 2
    assert load_tokenizer(directory)("a")["input_ids"] == tokenizer("a")["input_ids"]


CHANGES = ["two merges are lost", "an id is missing", "a symbol that no merge makes", "merges in the order of ids"]


@pytest.mark.parametrize("change", CHANGES)
def test_tokenizer_json_that_cannot_be_rebuilt_is_refused(change, make_directory):
    content = json.loads((DATA / "tokenizer_v4.json").read_text(encoding="utf-8"))
    if change == "two merges are lost":
        gone = {"".join(merge.split(" ")) for merge in content["model"]["merges"][:3]}
        content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m.split(" ")) not in gone]
    elif change == "an id is missing":
        content["model"]["vocab"]["###"] = 600
    elif change == "a symbol that no merge makes":
        content["model"]["vocab"]["<Symbol>"] = 512
    else:  # as of Mistral, whose scores have another order
        content["model"]["vocab"]["▁▁"] = 512
        content["model"]["merges"].append("▁ ▁")
    directory = make_directory({"tokenizer.json": content}, None)
    if change == "merges in the order of ids":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(WeightsError, match=r"tokenizer\.json.*put tokenizer\.model beside it"):
        load_tokenizer(directory)


def test_answer_ends_at_an_end_symbol_that_was_added_to_the_tokenizer(build_model, llm_copy, pool):
    """The LLM is changed so that it says the added token, row 512 of its output layer, where it said its first one."""
    directory = llm_copy()
    (directory / "added_tokens.json").write_text('{"<|im_end|>": 512}')
    model = build_model(llama_model=str(directory), end_sym="<|im_end|>").eval()
    embeds = [[model.encode_img(pool[:1])[0]]]
    prompt, decoding = ["###Human: <Img><ImageHere></Img> what? ###Assistant:"], Decoding(max_new_tokens=8)
    ids = generate_ids(model.llama_model, model.llama_tokenizer, *model.prompt_embeds(prompt, embeds), decoding)
    output = model.llama_model.get_output_embeddings().weight
    with torch.no_grad():
        output[512] = 2 * output[ids[0, 1]]
    (unstopped,) = model.answers_from_embeds(embeds, prompt, decoding)
    (stopped,) = model.answers_from_embeds(embeds, prompt, decoding, stop=["<|im_end|>"])
    assert not unstopped.ended
    assert unstopped.text.startswith("<|im_end|> ")
    assert (stopped.text, stopped.ended) == ("", True)
