"""Which YAML files lie under the user's: those in `minigpt4/configs`, and those of registered classes.

Shipped: `models/{arch}_{model_type}.yaml` and `datasets/{name}/{type}.yaml`. A registered model or builder
brings its own in `PRETRAINED_MODEL_CONFIG_DICT` or `DATASET_CONFIG_DICT`: {type: path}, the path absolute or
relative to the class's own file or to the package `minigpt4`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from minigpt4.common.registry import registry
from minigpt4.common.yaml_files import load_yaml

PACKAGE = Path(__file__).resolve().parents[1]
Catalogue = dict[str, dict[str, Path]]


@dataclass(frozen=True)
class DefaultFiles:
    """Default files by name and type; a name that has none is there with an empty table."""

    models: Catalogue = field(default_factory=dict)
    """{arch: {model_type: file}}"""

    datasets: Catalogue = field(default_factory=dict)
    """{dataset name: {type: file}}"""


def find_default_files() -> DefaultFiles:
    """Everything known now; a registered class's own table goes before the shipped files of that name."""
    models = _shipped_models(PACKAGE / "configs" / "models")
    datasets = _shipped_datasets(PACKAGE / "configs" / "datasets")
    for arch in registry.list_models():
        _add_class(models, arch, registry.get_model_class(arch), "PRETRAINED_MODEL_CONFIG_DICT")
    for name in registry.list_builders():
        _add_class(datasets, name, registry.get_builder_class(name), "DATASET_CONFIG_DICT")
    return DefaultFiles(models, datasets)


def _shipped_models(folder: Path) -> Catalogue:
    models: Catalogue = {}
    for file in sorted(folder.glob("*.yaml")):
        arch = load_yaml(file).model.arch
        models.setdefault(arch, {})[file.stem.removeprefix(f"{arch}_")] = file
    return models


def _shipped_datasets(folder: Path) -> Catalogue:
    datasets: Catalogue = {}
    for file in sorted(folder.glob("*/*.yaml")):
        datasets.setdefault(file.parent.name, {})[file.stem] = file
    return datasets


def _add_class(catalogue: Catalogue, name: str, cls: type, attribute: str) -> None:
    own = getattr(cls, attribute, None)
    if own:
        catalogue[name] = {kind: _class_file(cls, Path(path)) for kind, path in own.items()}
    else:
        catalogue.setdefault(name, {})


def _class_file(cls: type, path: Path) -> Path:
    module_file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    beside = Path(module_file).resolve().parent / path if module_file else path
    return beside if beside.exists() else PACKAGE / path
