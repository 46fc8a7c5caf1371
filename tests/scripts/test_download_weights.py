"""scripts/download_weights.py as a person runs it: a process, a folder, servers on 127.0.0.1."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("weights_server", ROOT / "tests" / "weights_server.py")
weights_server = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = weights_server  # dataclasses look their module up
spec.loader.exec_module(weights_server)

COMMIT = "c" * 40
WEIGHTS = save({"w": torch.arange(300_000.0)})


@pytest.fixture
def server():
    server = weights_server.WeightsServer()
    yield server
    server.stop()


@pytest.fixture
def command(server, tmp_path):
    """A function that runs the script on a small table and returns the finished process."""
    files = {
        "a": entry("a.safetensors", server.put("/a", WEIGHTS)),
        "b": entry("sub/b.safetensors", server.put("/b", WEIGHTS)),
        "llm": entry("llm", "hf:owner/llm", ignore=["*.bin"]),
        "secret": entry("secret", "hf:owner/secret", gated=True),
    }
    table = tmp_path / "table.yaml"
    table.write_text(yaml.safe_dump({"files": files, "presets": {"both": ["a", "b"]}}))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": server.url(),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }

    def run(*args: str, start=subprocess.run, **how):
        line = [sys.executable, str(ROOT / "scripts/download_weights.py"), "--table", str(table), *args]
        return start(line, cwd=tmp_path, env=environment, text=True, **how)

    return run


def entry(path: str, source: str, **more) -> dict:
    return {
        "path": path,
        "sources": [source],
        "about": len(WEIGHTS),
        "size": "exact",
        "goes_with": "x",
        **more,
    }


def hub(server, name: str, files: dict[str, bytes]) -> None:
    """Serve `files` as the repository owner/`name` of a Hugging Face."""
    tree, siblings = [], []
    for path, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 100}
        tree.append({"type": "file", "path": path, "size": len(content), "oid": "0" * 40, "lfs": lfs})
        siblings.append({"rfilename": path, "size": len(content), "blobId": "0" * 40, "lfs": lfs})
        headers = {"ETag": f'"{sha256}"', "X-Repo-Commit": COMMIT}
        server.put(f"/owner/{name}/resolve/{COMMIT}/{path}", content, headers=headers)
    info = json.dumps({"id": f"owner/{name}", "sha": COMMIT, "siblings": siblings}).encode()
    as_json = {"Content-Type": "application/json"}
    server.put(f"/api/models/owner/{name}", info, headers=as_json)
    server.put(f"/api/models/owner/{name}/revision/{COMMIT}", info, headers=as_json)
    server.put(f"/api/models/owner/{name}/tree/{COMMIT}", json.dumps(tree).encode(), headers=as_json)


def quietly(command, *args: str) -> subprocess.CompletedProcess:
    return command(*args, capture_output=True)


def test_preset_is_downloaded_and_a_second_run_does_nothing(command, server, tmp_path):
    first = quietly(command, "both")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "weights/sub/b.safetensors").read_bytes() == WEIGHTS
    asked = len(server.log)
    second = quietly(command, "both")
    assert (second.returncode, second.stdout) == (0, "nothing to do: a, b in weights\n")
    assert len(server.log) == asked


def test_manifest_records_source_size_and_hash(command, server, tmp_path):
    quietly(command, "a", "--dir", "elsewhere")
    record = json.loads((tmp_path / "elsewhere/manifest.json").read_text())["files"]["a.safetensors"]
    wanted = {
        "source": server.url("/a"),
        "bytes": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    }
    assert record == {"name": "a", **wanted}


def test_dry_run_tells_all_and_touches_nothing(command, server, tmp_path):
    done = quietly(command, "both", "llm", "--dry-run")
    assert done.returncode == 0
    assert f"into {tmp_path / 'weights'}" in done.stdout
    assert f"sub/b.safetensors from {server.url('/b')}" in done.stdout
    assert "llm from https://huggingface.co/owner/llm" in done.stdout
    assert "to fetch: about 3.6 MB; free: " in done.stdout
    assert not (tmp_path / "weights").exists()
    assert server.log == []


def test_dry_run_knows_what_is_there(command):
    quietly(command, "a")
    assert "to fetch: about 1.2 MB" in quietly(command, "both", "--dry-run").stdout


def test_verify_finds_a_changed_and_a_missing_file(command, tmp_path):
    quietly(command, "both")
    assert quietly(command, "both", "--verify").returncode == 0
    with (tmp_path / "weights/a.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    (tmp_path / "weights/sub/b.safetensors").unlink()
    done = quietly(command, "both", "--verify")
    assert done.returncode == 1
    assert "a.safetensors: its content has changed" in done.stdout
    assert "b.safetensors: missing" in done.stdout


def test_verify_before_the_download_says_so(command):
    done = quietly(command, "a", "--verify")
    assert (done.returncode, done.stdout) == (1, "a: not downloaded\n")


def test_file_that_was_deleted_is_fetched_again(command, tmp_path):
    quietly(command, "both")
    (tmp_path / "weights/a.safetensors").unlink()
    assert quietly(command, "both").stdout.startswith("a: 1.2 MB")
    assert (tmp_path / "weights/a.safetensors").read_bytes() == WEIGHTS


def test_killed_run_is_resumed_by_the_same_command(command, server, tmp_path):
    server.pages["/a"].steps.append("stall")
    process = command("both", start=subprocess.Popen, stderr=subprocess.DEVNULL)
    assert server.stalled.wait(60)
    part = tmp_path / "weights/a.safetensors.part"
    deadline = time.monotonic() + 60
    while part.stat().st_size < len(WEIGHTS) // 2:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert quietly(command, "both").returncode == 0
    assert (tmp_path / "weights/a.safetensors").read_bytes() == WEIGHTS
    assert server.ranges("/a") == [None, f"bytes={len(WEIGHTS) // 2}-"]


def test_one_file_that_fails_does_not_keep_the_others_away(command, server, tmp_path):
    del server.pages["/a"]
    done = quietly(command, "both")
    assert done.returncode == 2
    assert "error: a: no source gave it" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "weights/sub/b.safetensors").exists()


def test_unknown_name_is_answered_with_the_nearest(command):
    done = quietly(command, "bothh")
    assert done.returncode == 2
    assert "did you mean 'both'?" in done.stderr


def test_nothing_named_shows_the_usage(command):
    done = quietly(command)
    assert done.returncode == 2
    assert "name what to download" in done.stderr


def test_shipped_table_is_listed():
    line = [sys.executable, str(ROOT / "scripts/download_weights.py"), "--list"]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0
    assert "blip2_flant5xxl     433.5 MB" in done.stdout
    assert "preset llama2" in done.stdout


def test_hub_repository_is_downloaded_checked_and_noted(command, server, tmp_path):
    hub(
        server,
        "llm",
        {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"same again"},
    )
    done = quietly(command, "llm")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights/llm/model.safetensors").read_bytes() == WEIGHTS
    assert not (tmp_path / "weights/llm/pytorch_model.bin").exists()
    records = json.loads((tmp_path / "weights/manifest.json").read_text())["files"]
    assert set(records) == {"llm/config.json", "llm/model.safetensors"}
    assert records["llm/config.json"]["source"] == f"hf:owner/llm@{COMMIT}"
    assert quietly(command, "llm").stdout.startswith("nothing to do")


def test_hub_file_with_another_content_than_the_hub_says_is_deleted(command, server, tmp_path):
    hub(server, "llm", {"model.safetensors": WEIGHTS})
    server.pages[f"/owner/llm/resolve/{COMMIT}/model.safetensors"].body = WEIGHTS[:-1] + b"\xff"
    done = quietly(command, "llm")
    assert done.returncode == 2
    assert "its sha256 is" in done.stderr
    assert not (tmp_path / "weights/llm/model.safetensors").exists()


def test_gated_hub_repository_says_how_to_get_access(command, server):
    server.put("/api/models/owner/secret", steps=["401"], headers={"X-Error-Code": "GatedRepo"})
    done = quietly(command, "secret")
    assert done.returncode == 2
    assert "is gated: accept its licence at https://huggingface.co/owner/secret" in done.stderr


def test_hub_that_is_busy_is_asked_again(command, server, tmp_path):
    hub(server, "llm", {"model.safetensors": WEIGHTS})
    server.pages["/api/models/owner/llm"].steps.append("503")
    done = quietly(command, "llm")
    assert done.returncode == 0, done.stderr
    assert "trying again" in done.stderr


def test_hub_repository_that_is_not_there_is_named(command, server):
    server.put("/api/models/owner/llm", steps=["404"], headers={"X-Error-Code": "RepoNotFound"})
    done = quietly(command, "llm")
    assert done.returncode == 2
    assert "no repository owner/llm" in done.stderr
