"""The `model:` section: templates that are no templates."""

import pytest

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config


def _bind(template: str) -> MiniGPT4Config:
    return bind(MiniGPT4Config, {"prompt_template": template}, section="model", source="user.yaml")


@pytest.mark.parametrize("template", ["", "tokenizer", "{}", "###Human: {} ###Assistant: ", "{{json}} {}", "{{{}}}"])
def test_template_with_one_place_is_taken(template):
    assert _bind(template).prompt_template == template


@pytest.mark.parametrize(
    "template",
    [
        "none",
        "{} {}",
        "{0}",
        "{name}",
        "{0.__class__}",
        "{0[0]}",
        "{!r}",
        "{:10}",
        "{:>9999999999}",
        "{0:>9999999999}",
        "{:{}}",
        "{",
        "} {}",
        "{}}",
        "{{}}",
    ],
)
def test_any_other_template_is_refused_and_not_tried_out(template):
    with pytest.raises(ConfigError, match=r"model\.prompt_template: .* must hold exactly one \{\}"):
        _bind(template)
