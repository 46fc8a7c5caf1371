import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import exit_status


def test_an_error_to_mend_is_a_line_and_status_2(capsys):
    def fail():
        raise ConfigError("model.ckpt: there is no file x.pth")

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: model.ckpt: there is no file x.pth\n"
    assert exit_status(lambda: None) == 0


def test_a_bug_is_no_error_to_mend():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)
