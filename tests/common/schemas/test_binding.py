"""A YAML section becomes its dataclass, or one error that names every fault with key, file and remedy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from omegaconf import OmegaConf

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError


@dataclass
class Inner:
    name: str
    size: int = 1
    rest: dict[str, Any] = field(default_factory=dict, metadata={"extra": True})

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: {self.size} must be at least 1")


@dataclass
class Outer:
    REFUSED_KEYS: ClassVar = {"lora_r": "LoRA does not exist here yet"}

    needed: int
    rate: float | None = None
    flag: bool = False
    text: str = ""
    either: int | str = 0
    names: list[str] = field(default_factory=list)
    free: dict[str, Any] = field(default_factory=dict)
    mode: Literal["fp16", "bf16"] = "fp16"
    folder: Path | None = field(default=None, metadata={"path": "dir"})
    inner: Inner = field(default_factory=lambda: Inner("none"))

    def __post_init__(self) -> None:
        if self.flag and self.rate is None:
            raise ValueError("flag and rate go together")


def _bind(node: Any) -> Outer:
    return bind(Outer, node, section="run", source="user.yaml")


def _error(node: Any) -> str:
    with pytest.raises(ConfigError) as error:
        _bind(node)
    assert "user.yaml" in str(error.value)
    return str(error.value)


def test_absent_keys_get_the_schemas_defaults():
    assert _bind({"needed": 3}) == Outer(needed=3)


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("needed", "5000", 5000),
        ("needed", 1e3, 1000),
        ("rate", "1e-4", 1e-4),
        ("rate", 1, 1.0),
        ("rate", None, None),
        ("flag", False, False),
        ("text", "</s>", "</s>"),
        ("either", 3, 3),
        ("either", "three", "three"),
        ("names", ["a", "b"], ["a", "b"]),
        ("free", {"a": {"b": [1, None]}}, {"a": {"b": [1, None]}}),
        ("mode", "bf16", "bf16"),
        ("folder", "data/x", Path("data/x")),
        ("inner", {"name": "n", "size": 2, "mean": [0.5]}, Inner("n", 2, {"mean": [0.5]})),
    ],
)
def test_value_of_the_right_type_is_bound(key, value, bound):
    result = getattr(_bind({"needed": 1, key: value}), key)
    assert result == bound
    assert type(result) is type(bound)


def test_omegaconf_node_is_bound_with_its_interpolations():
    config = OmegaConf.create({"root": {"base": "data"}, "run": {"needed": 1, "text": "${root.base}/x"}})
    assert _bind(config.run).text == "data/x"


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("needed", 1.5, "run.needed: 1.5 must be a whole number"),
        ("needed", True, "run.needed: True must be a whole number"),
        ("needed", None, "run.needed: no value must be a whole number"),
        ("rate", "fast", "run.rate: 'fast' must be a number"),
        ("rate", float("nan"), "run.rate: nan must be a number"),
        ("flag", "False", "run.flag: 'False' must be true or false"),
        ("text", 5, "run.text: 5 must be text"),
        ("either", 1.5, "run.either: 1.5 must be"),
        ("names", "train", "run.names: 'train' must be a list"),
        ("names", ["a", 3], "run.names[1]: 3 must be text"),
        ("free", [1], "run.free: [1] must be keys with values"),
        ("mode", "fp8", "run.mode: 'fp8' must be one of fp16, bf16"),
        ("inner", "n", "run.inner: 'n' must be keys with values"),
        (
            "inner",
            {"size": 2},
            "run.inner.name: is missing; set it in user.yaml or with --options run.inner.name=",
        ),
        ("inner", {"name": "n", "size": 0}, "run.inner.size: 0 must be at least 1"),
    ],
)
def test_faulty_value_is_named_by_its_full_key(key, value, complaint):
    assert complaint in _error({"needed": 1, key: value})


def test_unknown_key_comes_with_the_nearest():
    assert "run.neded: unknown key; did you mean 'needed'?" in _error({"needed": 1, "neded": 2})


def test_missing_key_says_how_to_set_it():
    assert "run.needed: is missing; set it in user.yaml or with --options run.needed=..." in _error({})


def test_all_faults_are_told_at_once():
    text = _error({"neded": 2, "rate": "x", "inner": {"name": 1, "size": "y"}})
    assert text.count("\n  - run.") == 5


def test_complaint_of_the_schema_itself_carries_section_and_file():
    assert "run.flag and rate go together" in _error({"needed": 1, "flag": True})


def test_section_that_is_no_mapping_is_refused():
    assert "run: [1] must be keys with values" in _error([1])


@pytest.mark.parametrize("off", [0, None, False, ""])
def test_known_but_absent_feature_may_be_switched_off(off):
    assert _bind({"needed": 1, "lora_r": off}) == Outer(needed=1)


def test_known_but_absent_feature_is_refused_with_its_reason():
    assert "run.lora_r: LoRA does not exist here yet" in _error({"needed": 1, "lora_r": 64})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text", "please set this value to the path of vicuna model"),
        ("text", "/path/to/cc_sbu_align/"),
        ("text", "path/to/x.pth"),
        ("text", "<your path>"),
        ("text", "TODO"),
        ("text", "???"),
        ("folder", "<vicuna>"),
        ("names", ["a", "/path/to/b"]),
    ],
)
def test_placeholder_is_refused_with_the_way_to_set_it(key, value):
    text = _error({"needed": 1, key: value})
    assert f"run.{key}: " in text
    assert f"is a placeholder; set it in user.yaml or with --options run.{key}=..." in text


@pytest.mark.parametrize("text", ["</s>", "###", "<Img><ImageHere></Img>", "a/footpath/to/x", "/data/todo_list"])
def test_ordinary_text_is_no_placeholder(text):
    assert _bind({"needed": 1, "text": text}).text == text
