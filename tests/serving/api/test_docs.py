"""What docs/serve.md says is so."""

import ast
import base64
import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minigpt4.serving.api.access import ApiLimits
from minigpt4.serving.api.schema import ChatRequest

REPOSITORY = Path(__file__).parents[3]
TEXT = (REPOSITORY / "docs" / "serve.md").read_text(encoding="utf-8")


@pytest.fixture
def photo(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(images[0])
    return images[0]


def test_the_python_of_the_text_answers_twice(serve, photo, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    block = block.replace("http://localhost:8000/v1", serve(new_tokens=20).url).replace('"stage2"', '"first"')
    exec(compile(block, "<docs>", "exec"), {})
    assert all(capsys.readouterr().out.split("\n", 1))


def test_the_curl_of_the_text_is_answered(server, photo):
    """The words of the command as a shell splits them, sent as curl would."""
    (command,) = re.findall(r"^    (curl http\S+completions .*?\]\}\]\}')$", TEXT, re.DOTALL | re.MULTILINE)
    encoded = base64.b64encode(photo).decode()
    words = shlex.split(command.replace("'$(base64 -w0 photo.jpg)'", encoded))
    header, body = words[words.index("-H") + 1], words[words.index("-d") + 1]
    answer = server.post(json.loads(body) | {"model": "first", "max_tokens": 3}, **dict([header.split(": ")]))
    assert answer.status == 200
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0


def test_the_limits_of_the_text_are_those_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", TEXT, re.MULTILINE)
    assert {name: ast.literal_eval(value) for name, value in rows} == dataclasses.asdict(ApiLimits())


def test_every_field_is_in_the_text():
    fields = re.search(r"^## Fields$(.*?)^## Errors", TEXT, re.MULTILINE | re.DOTALL)[1]
    assert [name for name in ChatRequest.model_fields if f"`{name}" not in fields] == []
