"""Makes golden.json, tokenizer_v4.json and the SentencePiece models beside this file; needs no package of ours.

    python -m venv VENV && VENV/bin/pip install transformers==4.30.0 sentencepiece==0.2.2 "protobuf<4" "numpy<2"
    VENV/bin/python tests/data/llama_tokenizers/make.py

Each case is a directory of tokenizer files as they are found in the wild, with what the slow LlamaTokenizer of
transformers 4.30 makes of texts and ids with it.
"""

import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer, LlamaTokenizerFast

HERE = Path(__file__).parent
VICUNA = HERE.parent / "parity" / "vicuna_tiny"
CORPUS = ["the quick brown fox jumps over the lazy dog", "A dog's  bone: 12 $$ 345?", "###Human: <Img> yes </Img>"] * 20
MODELS = {
    "no_prefix": {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "vocab_size": 340,
    },
    "unigram": {"model_type": "unigram", "vocab_size": 60, "hard_vocab_limit": False},
    "symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<Img>", "$$"],
        "vocab_size": 340,
    },
}
END = {"<|im_end|>": 512}
PLAIN = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
SPECIAL = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
CASES = {
    "tokenizer.model alone": {},
    "no add_bos_token": {"tokenizer_config.json": LLAMA},
    "add_bos_token false": {"tokenizer_config.json": LLAMA | {"add_bos_token": False}},
    "plain strings": {"tokenizer_config.json": LLAMA | PLAIN},
    "plain strings in the map": {"tokenizer_config.json": LLAMA, "special_tokens_map.json": PLAIN},
    "empty strings of 2023": {
        "tokenizer_config.json": {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"},
        "special_tokens_map.json": {},
    },
    "CodeLlama": {"tokenizer_config.json": PLAIN | {"tokenizer_class": "CodeLlamaTokenizer"}},
    "fast class, legacy false": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}},
    "added token": {"tokenizer_config.json": LLAMA, "added_tokens.json": END},
    "added special string": {
        "special_tokens_map.json": {"additional_special_tokens": ["<|im_end|>"]},
        "added_tokens.json": END,
    },
    "added special token": {
        "special_tokens_map.json": {"additional_special_tokens": [SPECIAL]},
        "added_tokens.json": END,
    },
    "added eos": {"tokenizer_config.json": LLAMA | {"eos_token": "<|im_end|>"}, "added_tokens.json": END},
    "eos added by its name": {"tokenizer_config.json": LLAMA | {"eos_token": "<|im_end|>"}},
    "own pad": {"special_tokens_map.json": {"pad_token": "[PAD]"}, "added_tokens.json": {"[PAD]": 512}},
    "own pad with flags": {
        "special_tokens_map.json": {"pad_token": SPECIAL | {"content": "[PAD]"}},
        "added_tokens.json": {"[PAD]": 512},
    },
    "own pad in the configuration": {"tokenizer_config.json": LLAMA | {"pad_token": "[PAD]"}},
    "added piece": {"added_tokens.json": {"##": 512}},
    "add_bos_token null": {"tokenizer_config.json": LLAMA | {"add_bos_token": None}},
    "unknown token that is no piece": {"tokenizer_config.json": LLAMA | {"unk_token": "<none>"}},
    "eos that is a piece": {"tokenizer_config.json": LLAMA | {"eos_token": "."}},
    "cleaned up": {"tokenizer_config.json": LLAMA | {"clean_up_tokenization_spaces": True}},
    **{f"SentencePiece {name}": {"tokenizer_config.json": LLAMA, "model": f"{name}.model"} for name in MODELS},
}
TEXTS = [
    "",
    "hello",
    " leading",
    "two  blanks ",
    "a</s>b",
    "a </s> b",
    " </s>",
    "x<unk>y",
    "<s>[INST] hi [/INST] yes </s><s>[INST] more [/INST]",
    "###Human: <Img><ImageHere></Img> what? ###Assistant:",
    "café 日本 😀\n\t",
    "a$$b and $$ c",
    "A dog.<|im_end|>",
    "A dog. <|im_end|> \n Next",
    "[PAD] 1 \r\n[PAD]",
    "### and ## #",
    "\u2581under",
]
IDS = [[1, 5, 8, 2, 9, 30], [8, 0, 9], [8, 9, 2, 8], [2, 2, 8], [45, 10, 33], [1, 45, 46, 47]]


def main() -> None:
    for name, options in MODELS.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=str(HERE / name), minloglevel=2, **options
        )
        (HERE / f"{name}.vocab").unlink()
    fast = LlamaTokenizerFast.from_pretrained(VICUNA)
    fast.backend_tokenizer.save(str(HERE / "tokenizer_v4.json"))
    lines = [json.dumps(case(name, dict(files)), ensure_ascii=False) for name, files in CASES.items()]
    (HERE / "golden.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def case(name: str, files: dict) -> dict:
    model = files.pop("model", None)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        shutil.copy(HERE / model if model else VICUNA / "tokenizer.model", directory / "tokenizer.model")
        for file, content in files.items():
            (directory / file).write_text(json.dumps(content), encoding="utf-8")
        tokenizer = LlamaTokenizer.from_pretrained(directory)
    tokenizer.pad_token = "$$" if "$$" in tokenizer.get_vocab() else tokenizer.unk_token  # as MiniGPT-4 does
    special = [tokenizer(text)["input_ids"] for text in TEXTS]
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    ids = IDS + [[8, 512, 9], [512, 8, 512], [45, 512, 2, 512]] * (len(tokenizer) > 512) + [row for row in plain if row]
    return {
        "name": name,
        "model": model,
        "files": files,
        "ids": {key: getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "unk", "pad")},
        "encode": [list(row) for row in zip(TEXTS, plain, special)],
        "decode": [[row, tokenizer.decode(row), tokenizer.decode(row, skip_special_tokens=True)] for row in ids],
    }


if __name__ == "__main__":
    main()
