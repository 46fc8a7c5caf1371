"""What README and docs/chat.md show of Python and of captions of many images works as it stands, on tiny weights."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

REPOSITORY = Path(__file__).parents[2]
README, CHAT = (REPOSITORY / name for name in ("README.md", "docs/chat.md"))
SCRIPT = REPOSITORY / "scripts" / "caption.py"
BY_PIPELINE, BY_MODEL = "pipeline(", "MiniGPT4.from_config("


def _blocks(file: Path, marker: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if marker in block]


def _commands(file: Path) -> list[list[str]]:
    """Arguments of every call of the script, whoever launches it."""
    text = re.sub(r"\\\n\s*", "", file.read_text(encoding="utf-8"))
    calls = re.findall(r"^ {4}(?:python|torchrun) (?:\S+ )*?scripts/caption\.py (.*)$", text, re.MULTILINE)
    return [shlex.split(call) for call in calls]


def _run(block: str, image: Path, capsys) -> list[str]:
    torch.set_num_threads(1)
    exec(compile(block.replace('"photo.jpg"', repr(str(image))), "<docs>", "exec"), {})
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("file", [README, CHAT], ids=lambda file: file.name)
def test_pipeline_of_the_text_captions_and_chats(file, tiny_section, parity_dir, tmp_path, capsys):
    model = tiny_section(arch="minigpt4", model_type="pretrain_vicuna0", end_sym="###")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"model": model, "datasets": {}, "run": {"device": "cpu"}}))
    (block,) = _blocks(file, BY_PIPELINE)
    assert "eval_configs/minigpt4_eval.yaml" in block
    block = block.replace("eval_configs/minigpt4_eval.yaml", str(tmp_path / "tiny.yaml"))
    said = _run(block, parity_dir / "images" / "img3_rgb.png", capsys)
    assert len("".join(said)) > 20


def test_model_of_the_text_generates(tiny_section, parity_dir, capsys):
    (block,) = _blocks(CHAT, BY_MODEL)
    section, device = re.search(r"from_config\((\{.*?\}), (\S+)\)", block).groups()
    block = block.replace(section, repr(tiny_section())).replace(device, '"cpu"')
    block = block.replace("Blip2ImageEvalProcessor()", "Blip2ImageEvalProcessor(image_size=56)")
    assert _run(block, parity_dir / "images" / "img3_rgb.png", capsys)


@pytest.mark.parametrize(("file", "calls"), [(README, 1), (CHAT, 2), (SCRIPT, 2)], ids=["README", "chat", "script"])
def test_commands_of_the_text_have_arguments_of_the_script(load_script, file, calls):
    script = load_script("scripts/caption.py")
    found = _commands(file)
    assert len(found) == calls
    for arguments in found:
        args = script.parse_args(arguments)
        assert (REPOSITORY / args.cfg_path).is_file()
        assert args.output.suffix == ".jsonl"
