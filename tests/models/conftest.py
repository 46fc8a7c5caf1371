"""Tiny models built from the parity files; a build takes a fraction of a second on a CPU."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

POOL = 6
LLAVA = Path(__file__).parents[1] / "data" / "parity_llava"


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For all tests here."""


@pytest.fixture(scope="session")
def pool(golden_tensors) -> Tensor:
    """The reference's processed images, (6, 3, 56, 56)."""
    return torch.stack([golden_tensors[f"images/img{index}/train"] for index in range(POOL)])


@pytest.fixture(scope="session")
def assert_near() -> Callable[[Tensor, Tensor, float], None]:
    """`assert_near(actual, expected, atol)`: shapes equal, no number further apart than `atol`."""

    def check(actual: Tensor, expected: Tensor, atol: float) -> None:
        torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=0, atol=atol)

    return check


@pytest.fixture(scope="session")
def model(shared_model) -> Any:
    """The tiny model, which nobody changes."""
    return shared_model()


@pytest.fixture(scope="session")
def llm(model) -> Any:
    return model.llama_model


@pytest.fixture(scope="session")
def tokenizer(model) -> Any:
    return model.llama_tokenizer


@pytest.fixture(scope="session")
def llava(build_llava) -> Callable[..., Any]:
    """The same as `build_llava`, built once for the whole run; nobody changes it."""
    return functools.cache(lambda **changes: build_llava(**changes).eval())


@pytest.fixture(scope="session")
def llava_tensors(llava_dir) -> dict[str, Tensor]:
    """All expected tensors of the LLaVA reference, named `<section>/<case>/<name>`."""
    return {name: tensor for file in llava_dir.glob("golden_*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="session")
def llava_pixels(llava_tensors) -> Callable[..., Tensor]:
    """`llava_pixels(*names, mode="plain")`: the reference's processed images (n, 3, 56, 56); "zeros" is black."""
    folder = LLAVA.parent / "parity" / "images"
    names = sorted(path.name for path in folder.iterdir())

    def pixels(*wanted: str, mode: str = "plain") -> Tensor:
        every = llava_tensors[f"images/{mode}/pixel_values"]
        return torch.stack([torch.zeros_like(every[0]) if n == "zeros" else every[names.index(n)] for n in wanted])

    return pixels


@pytest.fixture
def llm_copy(parity_dir, tmp_path) -> Callable[..., Path]:
    """A writable copy of one of the LLM directories."""

    def copy(source: str = "vicuna_tiny", name: str = "llm") -> Path:
        return Path(shutil.copytree(parity_dir / source, tmp_path / name))

    return copy


@pytest.fixture
def changed_weights(tmp_path) -> Callable[..., Path]:
    """`changed_weights(file, change)`: a copy of a `.pth` file after `change(state_dict)` edited its weights."""

    def change_file(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
        content = torch.load(file, weights_only=True)
        change(content.get("model", content))
        path = tmp_path / f"changed_{Path(file).name}"
        torch.save(content, path)
        return path

    return change_file


@pytest.fixture
def changed_llm(llm_copy) -> Callable[..., Path]:
    """`changed_llm(change)`: a copy of the LLM whose safetensors went through `change(tensors)`."""

    def build(change: Callable[[dict[str, Tensor]], Any]) -> Path:
        directory = llm_copy("vicuna_tiny_safetensors")
        tensors = load_file(directory / "model.safetensors")
        save_file(change(tensors) or tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return build


@pytest.fixture
def change_json() -> Callable[[Path, Any], None]:
    """`change_json(file, key=value)` sets keys of a JSON file."""

    def change(file: Path, **changes: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.fixture(scope="session")
def byte_level_bpe() -> Callable[..., Tokenizer]:
    """`byte_level_bpe(*special)`: a BPE of bytes, as LLaMA 3 and Qwen have, which knows `$$`."""

    def train(*special: str) -> Tokenizer:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
        )
        backend.train_from_iterator(["$$x$$ costs $$ 5", "a dog and a cat sit on the mat"] * 50, trainer)
        return backend

    return train
