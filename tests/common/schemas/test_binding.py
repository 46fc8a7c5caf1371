"""A YAML section becomes its dataclass, or one error that names every fault with key, file and remedy."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest
from omegaconf import OmegaConf

from minigpt4.common.binding import Float, Int, PathTo, PositiveInt, bind, refuse
from minigpt4.common.errors import ConfigError
from minigpt4.common.schemas import ProcessorConfig


@dataclass
class Inner:
    name: str
    size: PositiveInt = 1


@dataclass
class Outer:
    REFUSED_KEYS: ClassVar = {"lora_r": "LoRA does not exist here yet"}

    needed: Int
    rate: Float | None = None
    flag: bool = False
    text: str = ""
    names: list[str] = field(default_factory=list)
    free: dict[str, Any] = field(default_factory=dict)
    mode: Literal["fp16", "bf16"] = "fp16"
    folder: Annotated[str | None, PathTo("dir")] = None
    inner: Inner = field(default_factory=lambda: Inner("none"))
    processor: ProcessorConfig = field(default_factory=lambda: ProcessorConfig("none"))

    def __post_init__(self) -> None:
        refuse((self.flag and self.rate is None, "rate: goes with flag"), (self.needed > 9, "needed: is too much"))


def _bind(node: Any) -> Outer:
    return bind(Outer, node, section="run", source="user.yaml", options=["run.mode"])


def _error(node: Any) -> str:
    with pytest.raises(ConfigError, match=r"^user\.yaml:\n") as error:
        _bind(node)
    return str(error.value)


def test_absent_keys_get_the_schemas_defaults():
    assert _bind({"needed": 3, "lora_r": 0}) == _bind({"needed": 3, "lora_r": None}) == Outer(needed=3)


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("needed", "5", 5),
        ("needed", 1e0, 1),
        ("rate", "1e-4", 1e-4),
        ("rate", 1, 1.0),
        ("rate", None, None),
        ("text", "</s>", "</s>"),
        ("names", ["a", "b"], ["a", "b"]),
        ("free", {"a": {"b": [1, None]}}, {"a": {"b": [1, None]}}),
        ("mode", "bf16", "bf16"),
        ("folder", "data/x", "data/x"),
        ("inner", {"name": "n", "size": 2}, Inner("n", 2)),
        ("processor", {"name": "n", "mean": [0.5]}, ProcessorConfig("n", None, {"mean": [0.5]})),
        *[
            ("text", ordinary, ordinary)
            for ordinary in ("###", "<Img><ImageHere></Img>", "a/footpath/to", "/todo_list")
        ],
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
    ("values", "complaint"),
    [
        ({"needed": 1.5}, "run.needed: 1.5 should be a valid integer"),
        ({"needed": True}, "run.needed: True must be a number"),
        ({"needed": None}, "run.needed: no value should be"),
        ({"needed": 2**63}, "run.needed: 9223372036854775808 must be"),
        ({"rate": "fast"}, "run.rate: 'fast' should be"),
        ({"rate": float("nan")}, "run.rate: nan should be a finite number"),
        ({"flag": "maybe"}, "run.flag: 'maybe'"),
        ({"text": 5}, "run.text: 5 should be"),
        ({"names": "train"}, "run.names: 'train' should be"),
        ({"names": ["a", 3]}, "run.names[1]: 3 should be"),
        ({"free": [1]}, "run.free: [1] must be keys with values"),
        ({"mode": "fp8"}, "--options run.mode: 'fp8' should be 'fp16' or 'bf16'"),
        ({"inner": "n"}, "run.inner: 'n' must be keys with values"),
        ({"inner": {"size": 2}}, "run.inner.name: is missing; set it in the file or with --options run.inner.name="),
        ({"inner": {"name": "n", "size": 0}}, "run.inner.size: 0"),
        ({"inner": {"nane": "n"}}, "run.inner.nane: unknown key; did you mean 'name'?"),
        ({3: 4}, "run.3: unknown key"),
        ({"lora_r": 64}, "run.lora_r: LoRA does not exist here yet"),
        ([1], "run: [1] must be keys with values"),
    ],
)
def test_faulty_value_is_named_by_its_full_key(values, complaint):
    assert complaint in _error({"needed": 1, **values} if isinstance(values, dict) else values)


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (
            {"neded": 2, "rate": "x", "names": ["TODO"], "inner": {"name": 1, "size": 0}},
            ["names[0]", "neded", "needed", "rate", "inner.name", "inner.size"],
        ),
        ({"needed": 10, "flag": True}, ["rate", "needed"]),
    ],
)
def test_all_faults_are_told_at_once(values, keys):
    lines = _error(values).splitlines()[1:]
    assert [line.removeprefix("  - run.").partition(":")[0] for line in lines] == keys


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
    ],
)
def test_placeholder_is_refused(key, value):
    assert f"run.{key}: '{value}' is a placeholder" in _error({"needed": 1, key: value})
