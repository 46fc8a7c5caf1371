"""`evaluate.sh`: which checkpoints it evaluates, in which order, and what it says on wrong use."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
RECORD = """#!/usr/bin/env bash
printf '%s\\n' "$PWD" "$@" >"$RECORD"
"""


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run with 11 epochs and files that are no epochs."""
    folder = tmp_path / "runs" / "20250608_111442"
    folder.mkdir(parents=True)
    for name in (*(f"checkpoint_{n}" for n in range(11)), "checkpoint_best", "checkpoint_iter_250"):
        (folder / f"{name}.pth").write_bytes(b"")
    (tmp_path / "start.pth").write_bytes(b"")
    return folder


@pytest.fixture
def evaluate(tmp_path):
    """Run the script from `tmp_path` with a Python that writes down how it is called."""
    python = tmp_path / "recording python"
    python.write_text(RECORD)
    python.chmod(0o755)

    def call(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        env = {**os.environ, "PYTHON": str(python), "RECORD": str(record), **environment}
        result = subprocess.run(
            ["bash", str(REPOSITORY / "evaluate.sh"), *arguments], capture_output=True, text=True, cwd=tmp_path, env=env
        )
        return result, record.read_text().splitlines() if record.exists() else []

    return call


def _checkpoints(called: list[str]) -> list[str]:
    return called[called.index("--ckpt") + 1 : called.index("--save_path")]


def test_pretrained_and_every_epoch_are_evaluated_in_order_with_what_else_is_given(evaluate, run_folder, tmp_path):
    more = ["--reference-mode", "separate", "--options", "run.generation.prompt=a b"]
    _, called = evaluate("runs/20250608_111442", "--pretrained", "start.pth", "--nproc", "1", "--", *more)
    assert called[-4:] == more
    epochs = [f"{run_folder}/checkpoint_{number}.pth" for number in range(11)]
    assert _checkpoints(called) == [f"pretrained={tmp_path}/start.pth", *epochs]
    assert called[:2] == [str(REPOSITORY), "eval_scripts/eval_flickr30k.py"]
    assert called[called.index("--cfg-path") + 1] == f"{REPOSITORY}/eval_configs/minigpt4_flickr_eval.yaml"
    assert called[called.index("--save_path") + 1] == f"{run_folder}/evaluation"


def test_environment_says_the_same_as_arguments(evaluate, run_folder):
    given = {"RUN": str(run_folder), "PRETRAINED": "none", "SAVE_PATH": "out", "NPROC": "3", "CFG_PATH": "my.yaml"}
    _, by_environment = evaluate(**given)
    paths = ("--save-path", "out", "--nproc", "3", "--cfg-path", "my.yaml")
    _, by_arguments = evaluate(str(run_folder), "--pretrained", "none", *paths)
    assert by_environment == by_arguments
    assert by_arguments[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    assert len(_checkpoints(by_arguments)) == 11


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "error: there is no folder nowhere"),
        (["runs", "--pretrained", "none"], "holds no checkpoint_N.pth"),
        (["runs/20250608_111442", "--pretrained", "gone.pth"], "error: there is no file gone.pth"),
        (["runs/20250608_111442", "--nproc", "many"], "many is not a number of processes"),
        (["runs/20250608_111442", "--unknown"], "usage: bash evaluate.sh"),
        (["runs/20250608_111442", "runs"], "usage: bash evaluate.sh"),
        (["runs/20250608_111442", "--nproc"], "usage: bash evaluate.sh"),
    ],
)
def test_wrong_use_is_explained(evaluate, run_folder, arguments, text):
    result, called = evaluate(*arguments)
    assert (result.returncode, called) == (2, [])
    assert text in result.stderr
