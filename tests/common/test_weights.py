"""The published weights: their table, downloads from a server on 127.0.0.1 that drops, lies and stalls, the command."""

import functools
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import save

from minigpt4.common import weights
from minigpt4.common.errors import ConfigError, RunError, WeightsError
from minigpt4.common.utils import human
from minigpt4.common.weights import TABLE, WeightsEntry, WeightsFolder, load_table, web_page

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "download_weights.py"
COMMIT = "c" * 40
WEIGHTS = save({"w": torch.arange(300_000.0)})
OTHER = save({"w": -torch.arange(300_000.0)})
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
CHUNK = 1 << 16
QUOTA = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"
FORM = b'<html><form id="download-form"><input type="hidden" name="uuid" value="a&amp;b"></form></html>'


@dataclass
class Page:
    """What lies at a path, and how the next requests for it go wrong."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    steps: list[str] = field(default_factory=list)
    """For one request each: `drop` (half, then close), `stall` (half, then nothing), `503`; then `send`."""
    form: bytes | None = None
    """Sent as Google Drive does, unless the query holds the form's hidden field."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.log = {}, []
        self.stalled, self.released = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, path: str, body: bytes = WEIGHTS, **how) -> str:
        self.pages[path] = Page(body, **how)
        return self.url(path)

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def hub(self, name: str, files: dict[str, bytes]) -> None:
        """Serve `files` as the repository owner/`name` of a Hugging Face."""
        siblings, tree = [], []
        for path, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            lfs = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 100}
            siblings.append({"rfilename": path, "size": len(content), "blobId": "0" * 40, "lfs": lfs})
            tree.append({"type": "file", "path": path, "size": len(content), "oid": "0" * 40, "lfs": lfs})
            headers = {"ETag": f'"{sha256}"', "X-Repo-Commit": COMMIT}
            self.put(f"/owner/{name}/resolve/{COMMIT}/{path}", content, headers=headers)
        info = json.dumps({"id": f"owner/{name}", "sha": COMMIT, "siblings": siblings}).encode()
        answers = {"": info, f"/revision/{COMMIT}": info, f"/tree/{COMMIT}": json.dumps(tree).encode()}
        for path, content in answers.items():
            self.put(f"/api/models/owner/{name}{path}", content, headers={"Content-Type": "application/json"})

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up early is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where, asked = urlsplit(self.path), self.headers.get("Range")
        self.server.log.append((where.path, asked))
        page = self.server.pages.get(where.path)
        if page is None:
            return self.send_error(404)
        step = page.steps.pop(0) if page.steps else "send"
        start = int(asked[6:].partition("-")[0]) if asked and page.ranges else 0
        status, body = (206 if start else 200), page.body[start:]
        if step.isdigit():
            status, body = int(step), b"{}"
        elif page.form is not None and "uuid=a%26b" not in where.query:
            status, body = 200, page.form
        elif start >= len(page.body) > 0:
            status = 416
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(page.body) - 1}/{len(page.body)}")
        for name, value in page.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if step in ("drop", "stall") else body)
        if step == "stall":
            self.server.stalled.set()
            self.server.released.wait(60)
        return None

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        """Say nothing; `log` has it."""


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub = {
        "ENDPOINT": server.url(),
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url("/{repo_id}/resolve/{revision}/{filename}"),
        "DOWNLOAD_CHUNK_SIZE": CHUNK,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in hub.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(weights, "DRIVE", server.url("/drive"))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # before it tries again
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def entry(*sources: str, path: str = "a.safetensors", **more) -> WeightsEntry:
    return WeightsEntry(
        **{"name": "a", "path": path, "sources": list(sources), "about": 1, "size": "", "goes_with": "", **more}
    )


@pytest.fixture
def folder(tmp_path) -> WeightsFolder:
    return WeightsFolder(tmp_path / "weights")


def left(folder: WeightsFolder) -> set[str]:
    return {path.name for path in folder.root.iterdir() if path.stat().st_size} - {"in_use.lock", "manifest.json"}


# One file


@pytest.mark.parametrize("how", [{}, {"steps": ["drop"]}, {"steps": ["drop"], "ranges": False}])
def test_file_arrives_whole_and_a_dropped_connection_is_resumed(server, folder, how):
    source = server.put("/a", **how)
    folder.get(entry(source, bytes=len(WEIGHTS), sha256=SHA256))
    assert (folder.root / "a.safetensors").read_bytes() == WEIGHTS
    assert left(folder) == {"a.safetensors"}
    record = {"name": "a", "source": source, "bytes": len(WEIGHTS), "sha256": SHA256}
    assert json.loads(folder.manifest.read_text()) == {"files": {"a.safetensors": record}}
    ranges = [asked for _, asked in server.log]
    assert ranges == [None, f"bytes={len(WEIGHTS) // 2 // CHUNK * CHUNK}-"][: 1 + bool(how)]
    folder.get(entry(source))
    assert len(server.log) == len(ranges)


def test_link_that_stays_broken_leaves_the_part_for_the_next_run(server, folder):
    source = server.put("/a", steps=["drop", "503"])
    with pytest.raises(WeightsError, match="503"):
        folder.get(entry(source))
    assert left(folder) == {"a.safetensors.part"}
    folder.get(entry(source))
    assert server.log[-1][1].startswith("bytes=")
    assert (folder.root / "a.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("part", [WEIGHTS, OTHER[:900_000], WEIGHTS + b"more"], ids=["whole", "of another", "longer"])
def test_part_that_does_not_fit_is_not_joined(server, folder, part):
    folder.root.mkdir()
    (folder.root / "a.safetensors.part").write_bytes(part)
    folder.get(entry(server.put("/a"), sha256=SHA256))
    assert (folder.root / "a.safetensors").read_bytes() == WEIGHTS
    assert left(folder) == {"a.safetensors"}


@pytest.mark.parametrize(
    ("body", "more", "message"),
    [
        (None, {}, "404"),
        (QUOTA, {}, "web page in place of the file.*quota"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", {}, "Git LFS pointer"),
        (WEIGHTS[:-9], {}, "broken or truncated"),
        (b"PK\x03\x04" + bytes(600), {"path": "a.pth"}, "broken or truncated"),
        (b"hello", {"path": "a.pth"}, "broken or truncated"),
        (b"", {"path": "a.pth"}, "empty"),
        (WEIGHTS, {"bytes": 17}, f"{len(WEIGHTS)} bytes, expected 17"),
        (WEIGHTS, {"sha256": "0" * 64}, f"sha256 is {SHA256}, expected 0000"),
    ],
)
def test_what_is_not_the_file_is_not_kept_and_the_next_source_is_tried(server, folder, body, more, message):
    source = server.url("/a") if body is None else server.put("/a", body)
    with pytest.raises(WeightsError, match=f"(?s)a: no source gave it.*{message}.*404.*/b"):
        folder.get(entry(source, server.url("/b"), **more))
    assert left(folder) == set()
    folder.get(entry(server.url("/none"), server.put("/b")))
    assert folder.records()["a.safetensors"]["source"] == server.url("/b")


@pytest.mark.parametrize("form", [None, FORM, QUOTA])
def test_google_drive_files_come_directly_or_behind_a_form_and_a_quota_is_named(server, folder, form):
    server.put("/drive", form=form)
    if form is QUOTA:
        with pytest.raises(WeightsError, match="quota is used up.*drive.google.com/file/d/F/view"):
            folder.get(entry("gdrive:F"))
        return
    folder.get(entry("gdrive:F"))
    assert folder.records()["a.safetensors"]["source"] == "gdrive:F"
    assert (folder.root / "a.safetensors").read_bytes() == WEIGHTS


def test_file_put_there_by_hand_is_taken_if_it_is_the_published_one(folder):
    folder.root.mkdir()
    (folder.root / "a.safetensors").write_bytes(WEIGHTS)
    with pytest.raises(WeightsError, match="not the published a; move it away"):
        folder.get(entry("http://127.0.0.1:9/a", sha256="0" * 64))
    assert left(folder) == {"a.safetensors"}
    folder.get(entry("http://127.0.0.1:9/a", sha256=SHA256))
    assert folder.has(entry("http://127.0.0.1:9/a"))


def test_disk_without_room_is_refused_before_and_one_that_fills_up_leaves_the_part(server, folder):
    source = server.put("/a")
    with pytest.raises(WeightsError, match=r"about 1000000000\.0 GB still to come, .* free on this disk"):
        folder.need_room([entry(source, about=10**18)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"a\.safetensors from http.*File too large"):
            folder.get(entry(source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder.get(entry(source))
    assert server.log[-1][1] == "bytes=1000000-"


# A repository


def test_repository_is_downloaded_checked_and_noted(server, folder):
    server.hub("llm", {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"same again"})
    llm, page = entry("hf:owner/llm", path="llm", ignore=["*.bin"]), f"/owner/llm/resolve/{COMMIT}/model.safetensors"
    server.pages[page].body = OTHER
    with pytest.raises(WeightsError, match=f"model.safetensors: not what the Hub says .*{SHA256}"):
        folder.get(llm)
    assert not (folder.root / "llm/model.safetensors").exists()
    server.pages[page].body = WEIGHTS
    folder.get(llm)
    assert (folder.root / "llm/model.safetensors").read_bytes() == WEIGHTS
    records = folder.records()
    assert set(records) == {"llm/config.json", "llm/model.safetensors"}
    assert records["llm/config.json"]["source"] == f"hf:owner/llm@{COMMIT}"


@pytest.mark.parametrize(("status", "code"), [("401", "GatedRepo"), ("404", "RepoNotFound")])
def test_gated_or_missing_repository_says_how_to_get_access(server, folder, status, code):
    server.put("/api/models/owner/secret", steps=[status], headers={"X-Error-Code": code})
    with pytest.raises(WeightsError, match="accept its licence at https://huggingface.co/owner/secret"):
        folder.get(entry("hf:owner/secret", path="llm"))


# The command


@pytest.fixture
def command(server, load_script, tmp_path, monkeypatch):
    """The script's `main` with a table of two files and a repository, in an empty folder."""
    common = {"about": len(WEIGHTS), "size": "exact", "goes_with": "x"}
    files = {
        "a": {"path": "a.safetensors", "sources": [server.put("/a")], **common},
        "b": {"path": "sub/b.safetensors", "sources": [server.put("/b")], **common},
        "llm": {"path": "llm", "sources": ["hf:owner/llm"], "gated": True, **common},
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"files": files, "presets": {"both": ["a", "b"]}}))
    monkeypatch.chdir(tmp_path)
    return lambda *args: load_script("scripts/download_weights.py").main(["--table", "table.yaml", *args])


def test_preset_is_planned_downloaded_once_verified_and_fetched_again(command, server, tmp_path, capsys):
    assert (command("both", "llm", "--dry-run"), server.log, (tmp_path / "weights").exists()) == (0, [], False)
    out = capsys.readouterr().out
    assert f"into {tmp_path / 'weights'}" in out
    assert f"sub/b.safetensors from {server.url('/b')}" in out
    assert "llm from https://huggingface.co/owner/llm; gated" in out
    assert "to fetch: about 3.6 MB; free: " in out
    assert command("both", "--verify") == 1
    assert capsys.readouterr().out == "a: not downloaded\nb: not downloaded\n"
    assert (command("both"), command("both", "--verify"), len(server.log)) == (0, 0, 2)
    assert (command("both"), len(server.log)) == (0, 2)
    assert "nothing to do: a, b in weights" in capsys.readouterr().out
    assert command("both", "llm", "--dry-run") == 0
    assert "to fetch: about 1.2 MB" in capsys.readouterr().out
    (tmp_path / "weights/a.safetensors").write_bytes(OTHER)
    (tmp_path / "weights/sub/b.safetensors").unlink()
    assert command("both", "--verify") == 1
    assert re.search(r"a\.safetensors: its content has changed.*\n.*b\.safetensors: missing", capsys.readouterr().out)
    assert command("b") == 0
    assert (tmp_path / "weights/sub/b.safetensors").read_bytes() == WEIGHTS


def test_wrong_names_missing_files_and_a_broken_manifest_are_errors(command, server, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command()
    assert "name what to download" in capsys.readouterr().err
    assert command("bothh") == 2
    assert "did you mean 'both'?" in capsys.readouterr().err
    del server.pages["/a"]
    assert command("both") == 2
    assert "error: a: no source gave it" in capsys.readouterr().err
    assert (tmp_path / "weights/sub/b.safetensors").exists()  # one that fails does not keep the others away
    (tmp_path / "weights/manifest.json").write_text("{}")
    assert command("both") == 2
    assert "manifest.json: broken; delete it" in capsys.readouterr().err


def test_process_asks_hf_endpoint_keeps_others_out_and_is_resumed_after_kill_9(command, server, tmp_path, monkeypatch):
    server.put("/api/models/owner/llm", steps=["401"], headers={"X-Error-Code": "GatedRepo"})
    server.put("/a", save({"w": torch.zeros(6_000_000)}), steps=["stall"])  # two of huggingface_hub's own chunks
    line = [sys.executable, str(SCRIPT), "--table", "table.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": server.url()}
    refused = subprocess.run([*line, "llm"], env=environment, stderr=subprocess.PIPE, text=True)
    assert "accept its licence" in refused.stderr
    process = subprocess.Popen([*line, "a"], env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stalled.wait(60)
    part, deadline = tmp_path / "weights/a.safetensors.part", time.monotonic() + 60
    while part.stat().st_size < 10_000_000:
        assert time.monotonic() < deadline
    monkeypatch.setattr(weights, "hold_folder", functools.partial(weights.hold_folder, patience=0))
    with pytest.raises(RunError, match=f"in use by process {process.pid}"):
        WeightsFolder(tmp_path / "weights").get(entry(server.url("/a")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert command("a") == 0
    assert (tmp_path / "weights/a.safetensors").stat().st_size == len(server.pages["/a"].body)
    assert server.log[-1][1].startswith("bytes=10")


# The table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "../a"}, "a.path"),
        ({"sources": ["ftp://x/a"]}, "a.sources"),
        ({"sources": []}, "a.sources"),
        ({"sice": 1}, "sice"),
    ],
)
def test_wrong_entry_of_a_table_is_named(tmp_path, change, message):
    good = {"path": "a", "sources": ["hf:a/b"], "about": 1, "size": "", "goes_with": ""}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"files": {"a": good | change}}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_table(tmp_path / "t.yaml")


def test_shipped_table_is_whole_and_the_document_shows_it():
    table, doc = load_table(), (ROOT / "docs/weights.md").read_text()
    assert len({file.path for file in table.files.values()}) == len(table.files)
    for name, file in table.files.items():
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.bytes in (None, file.about)
        row = next(line for line in doc.splitlines() if line.startswith(f"| `{name}` | `{file.path}` |"))
        assert human(file.about) in row
        assert all(f"({web_page(source)})" in row for source in file.sources)
        assert (f"`{file.sha256[:12]}...`" if file.sha256 else "not published") in row
    assert [human(size) for size in (0, 999, 1000, 433481467)] == ["0 B", "999 B", "1.0 kB", "433.5 MB"]
    for preset, names in table.presets.items():
        assert f"| `{preset}` | {', '.join(f'`{name}`' for name in names)} |" in doc
    for llm in yaml.safe_load(TABLE.read_text())["llms"]:
        row = next(line for line in doc.splitlines() if line.startswith(f"| `{llm['llm']}` | `{llm['model_type']}` |"))
        width, hidden = llm["projector"]
        assert f"| {width} -> {hidden} |" in row
        assert f"`'{llm['prompt_template']}'` | `'{llm['end_sym']}'`" in row
        for name in filter(None, (llm["stage1"], llm["aligned"])):
            assert f"`{name}`" in row
            assert table.files[name].about == (width * hidden + hidden) * 4 * 3
