"""The registry finds classes by kind and name, and explains what it cannot find."""

import pytest

from minigpt4.common.errors import RegistryError
from minigpt4.common.registry import Registry

KINDS = ("model", "task", "runner", "builder", "processor", "lr_scheduler")


class Walker:
    pass


class Runner:
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_registered_class_is_found_and_listed_under_its_kind_only(kind):
    registry = Registry()
    assert getattr(registry, f"register_{kind}")("thing")(Walker) is Walker
    assert getattr(registry, f"get_{kind}_class")("thing") is Walker
    assert {k: getattr(registry, f"list_{k}s")() for k in KINDS} == {k: ["thing"] if k == kind else [] for k in KINDS}


def test_unknown_name_lists_known_names_and_the_nearest():
    registry = Registry()
    registry.register_task("image_text_pretrain")(Walker)
    registry.register_task("retrieval")(Runner)
    with pytest.raises(RegistryError) as error:
        registry.get_task_class("image_text_pretrian")
    assert "did you mean 'image_text_pretrain'? Known: image_text_pretrain, retrieval" in str(error.value)


def test_same_name_for_another_class_is_refused_but_for_a_reloaded_one():
    registry = Registry()
    registry.register_model("minigpt4")(Walker)
    with pytest.raises(RegistryError, match="already registered as .*Walker"):
        registry.register_model("minigpt4")(Runner)
    reloaded = type("Walker", (), {"__module__": Walker.__module__, "__qualname__": Walker.__qualname__})
    registry.register_model("minigpt4")(reloaded)
    assert registry.get_model_class("minigpt4") is reloaded
