import json
import subprocess
import sys

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import write_json


def test_json_is_written_and_a_refusal_names_option_and_file(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é", "score": 0.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "é", "score": 0.5}
    with pytest.raises(ConfigError, match=r"--save_path: cannot write .*none/a\.json"):
        write_json(tmp_path / "none" / "a.json", {}, "--save_path")


MANY = """
import os, sys
from minigpt4.common.utils import write_whole
for turn in range(20):
    write_whole(__import__("pathlib").Path(sys.argv[1]) / str(turn), sys.argv[2] * 9999)
"""


def test_many_processes_may_write_the_same_file(tmp_path):
    commands = [[sys.executable, "-c", MANY, str(tmp_path), letter] for letter in "abcdefghijkl"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate()[1] for process in processes] == [""] * len(processes)
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, range(20)))
    assert all(len(set(path.read_text())) == 1 for path in tmp_path.iterdir())
