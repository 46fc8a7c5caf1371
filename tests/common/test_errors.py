"""Errors that a user can fix: one line and status 2, with help for misspelt names that is short enough to be read."""

import pytest

from minigpt4.common.errors import ConfigError, hint, nearest
from minigpt4.common.utils import exit_status


def test_error_of_the_user_is_a_line_and_status_2(capsys):
    def fail():
        raise ConfigError("model.ckpt: there is no file x.pth")

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: model.ckpt: there is no file x.pth\n"
    assert exit_status(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_few_names_are_listed_behind_the_nearest_and_many_only_where_none_is_near():
    assert hint("modle", ["run", "model"]) == "did you mean 'model'? Known: model, run"
    assert nearest("zzz", ["model", "run"]) is None
    names = [f"key_{letter}" for letter in "abcdefghijklmnop"] + ["image_size"]
    assert hint("image_sise", names) == "did you mean 'image_size'?"
    assert hint("xyz", names).startswith("Known: image_size, key_a, key_b")
