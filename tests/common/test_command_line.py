import json

import pytest

from minigpt4.common.command_line import exit_status, write_json
from minigpt4.common.errors import ConfigError


def test_an_error_to_mend_is_a_line_and_status_2(capsys):
    def fail():
        raise ConfigError("model.ckpt: there is no file x.pth")

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: model.ckpt: there is no file x.pth\n"
    assert exit_status(lambda: None) == 0


def test_a_bug_is_no_error_to_mend():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_json_is_written_and_a_refusal_names_option_and_file(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é", "score": 0.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "é", "score": 0.5}
    with pytest.raises(ConfigError, match=r"--save_path: cannot write .*none/a\.json"):
        write_json(tmp_path / "none" / "a.json", {}, "--save_path")
