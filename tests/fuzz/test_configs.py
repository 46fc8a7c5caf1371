"""Configurations with anything in them are valid or an error that names the file or the option, in bounded memory."""

import copy
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from minigpt4.common.binding import expand_braces, missing_paths
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, RegistryError

REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("train_configs", "eval_configs") for path in (REPOSITORY / folder).glob("*.yaml"))
MEMORY = 3 << 30
"""Bytes that one test may map beyond what is mapped when it starts."""

CASES = 200


def words(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


NUMBERS = [0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e30, 1e-30, -0.0, float("inf"), float("nan"), 0.5, True, False]
TEXTS = [
    *words(r"""???|null|auto|tokenizer|${model}|${run.seed}|${nope.nope}|${oc.env:HOME}|${oc.env:NOT_SET_ANYWHERE}|${custom:1}
${|${oc.decode:'[1,'}|${oc.decode:${run.seed}}|${.seed}|${..run}|${run.job_name}${run.job_name}|{0.__class__}|{!r}
{:>9999999999}|{0:>9999999999}|{}|{|}|{}{}|{{}}|{{{}}}|{a[0]}|~nouser/x|~|{0..2000000000}|s/{0..99999}{0..99999}.tar
{0..9..0}|{z..a}.tar|{a,b|http://x/{0..2000000000}.tar|pipe:cat {0..3}.tar
/path/to/x|1e-4|0x10|1_000|2001-01-01|\
%s%n"""),
    *("", " ", "a\0b", "n" * 300, "d/" * 3000, "\ud800", "\u202e\x85\x07", "é" * 200, "{" * 900 + "}" * 900),
    "x" * 100_000,
]
YAML = [
    *words(r"""!!python/object:os.system x|!!binary x|!!int ''|!!set {a, b}|2001-99-99|&a [*a]|&a {b: *a}|*nope|"|'
%YAML 9.9|<<: 3|@x|&a [&b [&c [*b, *c]], *b]|{null: 1, true: 2, 3: 4, 1.5: 5}|{a: 1, a: 2}|<<: [1, {a: 2}]|1:60:99"""),
    *("[" * 500 + "]" * 500, "[" * 5000, "{a: " * 60 + "1" + "}" * 60, "9" * 5000, "\x01", ""),
    *("\t- a", "? [a]\n: b", "? \n: b", "- a\nb: c", "--- a\n--- b"),
]


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """More memory than a reading may take is a MemoryError, here and in whatever it calls."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def accepts(file: Path, options: list[str]) -> bool:
    """Read as `train.py --check` does before it needs torch; False for an error that says where."""
    refusal = ""
    try:
        config = Config(SimpleNamespace(cfg_path=str(file), options=options))
        config.validate(training=False)
        config.pretty()
        missing_paths(config.sections())
        for dataset in config.datasets.values():
            info = dataset.build_info
            for storage in filter(None, (info.storage, info.val_storage, info.test_storage)):
                expand_braces(storage)
        if config.model.prompt_template != "tokenizer":
            assert len((config.model.prompt_template or "{}").format("text")) < 200_000
        config.validate()
    except (ConfigError, RegistryError) as error:
        refusal = str(error)
    assert not refusal or str(file) in refusal or "--options" in refusal, refusal
    assert len(refusal) < 20_000
    return not refusal


def places(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Path and content of every place in a tree."""
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def value(chance: random.Random, trees: list[Any]) -> Any:
    """Anything that may stand in a configuration, often something of another place, now and then deep within."""
    odd = [None, [], {}, [[]], [None], [{}], {"": ""}, {None: 1}, {1: {2: 3}}, ["a", 1, None]]
    found = copy.deepcopy(chance.choice(chance.choice([NUMBERS, odd, trees, TEXTS, TEXTS])))
    for _ in range(chance.choice([0, 0, 0, 0, 0, 3, 30, 90])):
        found = chance.choice([[found], {"a": found}])
    return found


def mutate_text(text: str, chance: random.Random) -> str:
    """A change of the text, which may then be no YAML."""
    lines, at = text.splitlines(), chance.randrange(len(text))
    line = chance.randrange(len(lines))
    kind = chance.randrange(7)
    if kind == 0:
        lines[line] = lines[line].partition(":")[0] + ": " + chance.choice(YAML)
    elif kind == 1:
        lines[line] = chance.choice([" ", "\t", "- ", "#", "<<: "]) + lines[line]
    elif kind == 2:
        lines.insert(line, chance.choice(lines))
    elif kind == 3:
        lines.insert(chance.choice([0, len(lines)]), "imports: [os, nope.nope]")
    elif kind == 4:
        return text[:at] + chance.choice(YAML + TEXTS) + text[at:]
    elif kind == 5:
        return text[:at]
    else:
        return "".join(chance.choice([one, "\0", "ÿ", ""]) if chance.random() < 0.01 else one for one in text)
    return "\n".join(lines)


def random_option(tree: Any, chance: random.Random) -> str:
    path = [str(key) for key in chance.choice([path for path, _ in places(tree) if path])]
    if chance.random() < 0.3:
        odd = chance.choice(["", "x", "[0]", "a[", "]", "x" * 300, "a." * 999])
        path.insert(chance.randrange(len(path) + 1), odd)
    text = chance.choice(chance.choice([TEXTS, YAML, [str(number) for number in NUMBERS]]))
    return ".".join(path) + chance.choice(["=", "=", "=", "", "=="]) + text


def test_configurations_are_valid_or_refused_by_name(random_cases, tmp_path):
    known = [yaml.safe_load(path.read_text()) for path in SOURCES]
    trees = [tree for source in known for _, tree in places(source)]
    keys = {str(key) for tree in trees if isinstance(tree, dict) for key in tree}
    names = ["", "a.b", "x y", 3, None, True, 1.5, "k" * 500, *(f"{key}s" for key in keys), *keys]
    accepted, file = 0, tmp_path / "some.yaml"
    for name, chance in random_cases(CASES):
        tree = chance.choice(known)
        options = [random_option(tree, chance) for _ in range(chance.choice([0, 0, 0, 1, 1, 3]))]
        for _ in range(chance.choice([0, 1, 1, 2, 4])):
            tree = chance.change(tree, lambda _, chance=chance: value(chance, trees), names)
        text = yaml.dump(tree, allow_unicode=True, sort_keys=False)
        if chance.random() < 0.4:
            text = mutate_text(text, chance)
        file.write_bytes(text.encode("utf-8", errors=chance.choice(["replace", "surrogatepass"])))
        try:
            accepted += accepts(file, options)
        except Exception as error:
            raise AssertionError(f"{name}: options {options}\n{text}") from error
    assert accepted, "or nothing is tested but refusals"
