"""The wheel: all commands and recipes, from an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def command(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    return python(installed, cwd, "-m", "minigpt4", *arguments)


def files_in(folder: Path, root: Path) -> set[Path]:
    return {path.relative_to(root) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_has_every_script_recipe_and_data_file_of_the_checkout(installed):
    home, package = installed / "minigpt4" / "home", installed / "minigpt4"
    for folder in ("eval_scripts", "scripts", "train_configs", "eval_configs", "prompts"):
        assert files_in(ROOT / folder, ROOT) == files_in(home / folder, home)
    tracked = subprocess.run(["git", "ls-files", "minigpt4"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split() or [str(f.relative_to(ROOT)) for f in (ROOT / "minigpt4").rglob("*.py")]
    assert [name for name in names if not (package.parent / name).is_file()] == []


def test_the_image_is_built_from_all_that_the_wheel_holds():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    home = re.findall(r'"([\w.]+)"', " ".join(re.findall(r"^HOME .*", (ROOT / "setup.py").read_text(), re.MULTILINE)))
    assert {"train.py", "prompts"} <= set(home)
    assert {*home, "minigpt4", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"} == kept


def test_recipes_are_copied_once_find_the_weights_of_the_package_and_a_changed_one_stays(installed, tmp_path):
    done = command(installed, tmp_path, "recipes")
    assert done.returncode == 0, done.stderr
    recipe = tmp_path / "train_configs/mini_stage1_pretrain.yaml"
    assert recipe.read_bytes() == (ROOT / recipe.relative_to(tmp_path)).read_bytes()
    done = command(installed, tmp_path, "train", "--cfg-path", str(recipe))
    assert "model.llama_model: data/mini" in done.stderr  # not downloaded here
    assert "vit_weights" not in done.stderr
    assert "q_former_model" not in done.stderr
    recipe.write_text("changed")
    assert command(installed, tmp_path, "recipes").stdout == ""
    assert recipe.read_text() == "changed"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 0, "minigpt4 evaluate NAME"),
        (["tarin"], 2, "invalid choice: 'tarin'"),
        (["train", "--check", "--cfg-path", "no.yaml"], 2, "no.yaml: no such file"),
        (["evaluate", "flickr30k", "--help"], 0, "score the captions"),
        (["evaluate", "vqx"], 2, "invalid choice: 'vqx'"),
        (["caption", "--help"], 0, "--retry-failed"),
        (["chat", "--help"], 0, "--cfg-path"),
    ],
)
def test_commands_are_those_of_the_checkout(installed, tmp_path, arguments, status, said):
    done = command(installed, tmp_path, *arguments)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr


def test_without_the_checkout_errors_name_the_package_of_pip(installed, tmp_path):
    code = "from minigpt4.common.utils import install_command; print(install_command('mini'))"
    assert python(installed, tmp_path, "-c", code).stdout == 'pip install --upgrade "minigpt4-vlm[mini]"\n'
