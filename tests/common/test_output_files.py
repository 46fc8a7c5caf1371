import json

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.common.output_files import write_json


def test_json_is_written_and_a_refusal_names_option_and_file(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é", "score": 0.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "é", "score": 0.5}
    with pytest.raises(ConfigError, match=r"--save_path: cannot write .*none/a\.json"):
        write_json(tmp_path / "none" / "a.json", {}, "--save_path")
