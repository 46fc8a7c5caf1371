"""minigpt4.common.download against a real server on 127.0.0.1 that drops, lies, stalls and redirects."""

import base64
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from minigpt4.common.download import Expected, Retry, drive_url, fetch
from minigpt4.common.errors import WeightsError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("weights_server", ROOT / "tests" / "weights_server.py")
weights_server = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = weights_server  # dataclasses look their module up
spec.loader.exec_module(weights_server)

QUICK = Retry(tries=3, first_wait=0.01, timeout=10)
PAGE = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = weights_server.WeightsServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> bytes:
    """A torch file of about 4 MB."""
    path = tmp_path_factory.mktemp("torch") / "weights.pth"
    generator = torch.Generator().manual_seed(0)
    torch.save({"model": {"w": torch.randn(1000, 1000, generator=generator)}}, path)
    return path.read_bytes()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "weights" / "a.pth"


def left(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_whole_file_arrives_and_nothing_else_stays(server, weights, target):
    fetched = fetch(server.put("/a.pth", weights), target, Expected(len(weights), sha256(weights)), QUICK)
    assert target.read_bytes() == weights
    assert (fetched.bytes, fetched.sha256) == (len(weights), sha256(weights))
    assert left(target) == {"a.pth"}


def test_dropped_connection_is_resumed_where_it_broke(server, weights, target):
    fetch(server.put("/a.pth", weights, steps=["drop"]), target, retry=QUICK)
    assert target.read_bytes() == weights
    assert server.ranges("/a.pth") == [None, f"bytes={len(weights) // 2}-"]


def test_server_that_ignores_range_sends_the_whole_file_again(server, weights, target):
    fetch(server.put("/a.pth", weights, ranges=False, steps=["drop"]), target, retry=QUICK)
    assert target.read_bytes() == weights
    assert len(server.log) == 2


def test_drops_as_often_as_bytes_keep_coming_are_no_reason_to_give_up(server, weights, target):
    fetch(server.put("/a.pth", weights, steps=["drop"] * 6), target, retry=QUICK)
    assert target.read_bytes() == weights


def test_link_that_stays_broken_leaves_the_part_for_the_next_run(server, weights, target):
    url = server.put("/a.pth", weights, steps=["drop", "503", "503", "503"])
    with pytest.raises(WeightsError, match="HTTP 503.*3 times in a row.*run the same command again"):
        fetch(url, target, retry=QUICK)
    assert target.with_name("a.pth.part").stat().st_size == len(weights) // 2
    fetch(url, target, retry=QUICK)
    assert target.read_bytes() == weights
    assert server.ranges("/a.pth")[-1] == f"bytes={len(weights) // 2}-"


def test_busy_server_is_asked_again(server, weights, target):
    fetch(server.put("/a.pth", weights, steps=["503", "429"]), target, retry=QUICK)
    assert target.read_bytes() == weights


def test_missing_file_is_refused_at_once(server, target):
    with pytest.raises(WeightsError, match=r"a\.pth: http.*/a\.pth is not there \(HTTP 404\)"):
        fetch(server.url("/a.pth"), target, retry=QUICK)
    assert len(server.log) == 1
    assert left(target) == set()


def test_no_server_at_all_is_an_error_that_names_the_source(target):
    with pytest.raises(WeightsError, match=r"from http://127\.0\.0\.1:9/a\.pth: no connection"):
        fetch("http://127.0.0.1:9/a.pth", target, retry=QUICK)


def test_web_page_in_place_of_the_file_is_named_as_such(server, target):
    url = server.put("/a.pth", PAGE, headers={"Content-Type": "text/html"})
    with pytest.raises(WeightsError, match="web page in place of the file.*quota"):
        fetch(url, target, retry=QUICK)
    assert left(target) == set()


def test_web_page_under_a_false_content_type_is_seen_by_its_content(server, target):
    url = server.put("/a.pth", PAGE, headers={"Content-Type": "application/octet-stream"})
    with pytest.raises(WeightsError, match="web page in place of the file"):
        fetch(url, target, retry=QUICK)
    assert left(target) == set()


def test_wrong_size_is_refused_before_the_bytes_come(server, weights, target):
    with pytest.raises(WeightsError, match=f"has {len(weights)} bytes, expected 17"):
        fetch(server.put("/a.pth", weights), target, Expected(bytes=17), QUICK)
    assert left(target) == set()


def test_wrong_size_is_seen_where_the_server_announces_none(server, weights, target):
    url = server.put("/a.pth", weights, headers={"Content-Length": "unknown"})
    with pytest.raises(WeightsError, match=f"{len(weights)} bytes came, expected 17"):
        fetch(url, target, Expected(bytes=17), QUICK)


@pytest.mark.parametrize(
    ("headers", "expected", "message"),
    [
        ({}, Expected(sha256="0" * 64), "its sha256 is [0-9a-f]{64}, expected 0{64}"),
        (
            {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(bytes(16)).decode()}"},
            Expected(),
            "its md5 is",
        ),
        ({"Content-MD5": base64.b64encode(bytes(16)).decode()}, Expected(), "its md5 is"),
        ({"ETag": '"' + "0" * 64 + '"', "X-Repo-Commit": "main"}, Expected(), "its sha256 is"),
    ],
    ids=["table", "google", "content-md5", "hugging-face"],
)
def test_wrong_hash_is_refused_and_deleted(server, weights, target, headers, expected, message):
    url = server.put("/a.pth", weights, headers=headers)
    with pytest.raises(WeightsError, match=f"{message}.*nothing was kept"):
        fetch(url, target, expected, QUICK)
    assert left(target) == set()


def test_right_google_md5_is_accepted_also_after_a_drop(server, weights, target):
    md5 = base64.b64encode(hashlib.md5(weights).digest()).decode()
    fetch(
        server.put("/a.pth", weights, headers={"x-goog-hash": f"md5={md5}"}, steps=["drop"]),
        target,
        retry=QUICK,
    )
    assert target.read_bytes() == weights


def test_hash_named_in_a_redirect_of_hugging_face_is_checked(server, weights, target):
    server.put("/storage", weights)
    url = server.put("/a.pth", headers={"Location": "/storage", "X-Linked-ETag": '"' + "0" * 64 + '"'})
    with pytest.raises(WeightsError, match="its sha256 is .*, expected 0{64}"):
        fetch(url, target, retry=QUICK)
    server.pages["/a.pth"].headers["X-Linked-ETag"] = f'"{sha256(weights)}"'
    fetch(url, target, retry=QUICK)
    assert target.read_bytes() == weights


def test_etag_of_another_server_is_not_taken_for_a_hash(server, weights, target):
    fetch(server.put("/a.pth", weights, headers={"ETag": '"' + "0" * 64 + '"'}), target, retry=QUICK)
    assert target.read_bytes() == weights


def test_file_that_changed_on_the_server_is_not_joined_to_the_old_part(server, weights, target):
    url = server.put("/a.pth", bytes(len(weights)), headers={"ETag": '"old"'}, steps=["drop", "503", "503", "503"])
    with pytest.raises(WeightsError):
        fetch(url, target, retry=QUICK)
    server.put("/a.pth", weights, headers={"ETag": '"new"'})
    fetch(url, target, retry=QUICK)
    assert target.read_bytes() == weights


def test_part_of_another_length_than_the_server_has_starts_again(server, weights, target):
    url = server.put("/a.pth", weights + bytes(9), steps=["drop", "503", "503", "503"])
    with pytest.raises(WeightsError):
        fetch(url, target, retry=QUICK)
    server.put("/a.pth", weights)
    fetch(url, target, retry=QUICK)
    assert target.read_bytes() == weights


def test_part_of_another_source_is_not_used(server, weights, target):
    other = server.put("/b.pth", bytes(len(weights)), steps=["drop", "503", "503", "503"])
    with pytest.raises(WeightsError):
        fetch(other, target, retry=QUICK)
    fetch(server.put("/a.pth", weights), target, retry=QUICK)
    assert server.ranges("/a.pth") == [None]
    assert target.read_bytes() == weights


def test_killed_download_goes_on_where_it_was(server, weights, target):
    url = server.put("/a.pth", weights, steps=["stall"])
    fetching = f"fetch({url!r}, Path({str(target)!r}))"
    code = f"from pathlib import Path; from minigpt4.common.download import fetch; {fetching}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    part = target.with_name("a.pth.part")
    assert server.stalled.wait(60)
    deadline = time.monotonic() + 60
    while part.stat().st_size < len(weights) // 2:
        assert time.monotonic() < deadline
    with pytest.raises(WeightsError, match="another process is downloading it"):
        fetch(url, target, retry=QUICK)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    fetch(url, target, retry=QUICK)
    assert target.read_bytes() == weights
    assert server.ranges("/a.pth") == [None, f"bytes={len(weights) // 2}-"]


def test_disk_that_takes_no_more_bytes_is_an_error_and_the_part_is_resumed(server, weights, target):
    url = server.put("/a.pth", weights)
    code = f"""
import resource
from pathlib import Path
from minigpt4.common.download import fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000))
fetch({url!r}, Path({str(target)!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "WeightsError" in done.stderr
    assert "cannot write (File too large). 1.0 MB are kept; run the same command again" in done.stderr
    fetch(url, target, retry=QUICK)
    assert target.read_bytes() == weights
    assert server.ranges("/a.pth") == [None, "bytes=1000000-"]


def test_part_that_is_whole_already_is_only_checked(server, weights, target):
    url = server.put("/a.pth", weights)
    target.parent.mkdir()
    target.with_name("a.pth.part").write_bytes(weights)
    target.with_name("a.pth.part.json").write_text(json.dumps({"source": url, "total": len(weights)}))
    fetch(url, target, Expected(sha256=sha256(weights)), QUICK)
    assert target.read_bytes() == weights
    assert server.log == []


def test_google_drive_form_with_its_token_is_followed(server, weights, target):
    form = (
        '<html><form id="download-form" action="/file" method="get"><input type="hidden" name="id" value="F">'
        '<input type="hidden" name="confirm" value="t0k"><input type="submit" value="go"></form></html>'
    )
    server.put("/file", weights, query={"id": "F", "confirm": "t0k"}, page=PAGE)
    server.put("/download", query={"never": "1"}, page=form.encode())
    find = partial(drive_url, file_id="F", base=server.url("/download"))
    fetched = fetch(lambda opener, timeout: find(opener, timeout=timeout), target, retry=QUICK, source="gdrive:F")
    assert target.read_bytes() == weights
    assert fetched.source == "gdrive:F"


def test_google_drive_file_without_a_form_is_fetched_directly(server, weights, target):
    server.put("/download", weights, query={"id": "F"})
    fetch(
        lambda opener, timeout: drive_url(opener, "F", timeout, server.url("/download")),
        target,
        retry=QUICK,
        source="gdrive:F",
    )
    assert target.read_bytes() == weights


def test_google_drive_quota_page_says_what_to_do(server, target):
    server.put("/download", query={"never": "1"}, page=PAGE)
    with pytest.raises(WeightsError, match="quota is used up.*open https://drive.google.com/file/d/F/view"):
        fetch(
            lambda opener, timeout: drive_url(opener, "F", timeout, server.url("/download")),
            target,
            retry=QUICK,
            source="gdrive:F",
        )
