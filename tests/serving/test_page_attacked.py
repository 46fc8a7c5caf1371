"""The page as `demo.py` serves it, asked over HTTP for what no browser would ask; nothing gets out, and it goes on."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

pytest.importorskip("gradio")

REPOSITORY = Path(__file__).parents[2]
META = {"_type": "gradio.FileData"}
MIB = 1 << 20
IMAGE_MIB = 2
"""--max-image-mib, so that a visitor may have 16 MiB and all together 128."""


class Page:
    """A process of its own; its log is read while it runs."""

    def __init__(self, config, temporary):
        command = [sys.executable, "demo.py", "--cfg-path", str(config), "--max-image-mib", str(IMAGE_MIB)]
        self.temporary = temporary
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "OMP_NUM_THREADS": "1",
                "GRADIO_TEMP_DIR": str(temporary),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30)),
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = re.findall(r"http://\S+", self.process.stdout.readline())[0].rstrip("/")

    def _read(self):
        for line in self.process.stderr:
            self.log += line

    @property
    def peak(self):
        """Most memory that it ever held, bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10

    @property
    def stored(self):
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.temporary.rglob("*") if file.is_file())

    def end(self):
        self.process.terminate()
        self.process.wait(60)
        self._reader.join(60)
        return self.log


class Visitor:
    """A browser with one tab, without its good manners."""

    def __init__(self, url):
        self.http, self.url, self.tab = httpx.Client(timeout=120), url, uuid.uuid4().hex[:11]
        self.http.get(url)
        config = self.http.get(f"{url}/config").json()
        kinds = {component["id"]: component["type"] for component in config["components"]}
        self.functions = {}
        for function in config["dependencies"]:
            inputs = tuple(kinds[number] for number in function["inputs"])
            self.functions.setdefault(inputs, function["id"])
            self.functions[tuple(name for _, name in function["targets"])] = function["id"]
        self.put = self.functions["textbox", "image"]
        self.check = self.functions["image",]
        self.answer = next(number for inputs, number in self.functions.items() if inputs.count("slider") == 5)
        self.edit = self.functions["edit",]
        self.example = self.functions["dataset",]

    def upload(self, content, name="picture.png", **more):
        return self.http.post(f"{self.url}/gradio_api/upload", files={"files": (name, content)}, **more)

    def given(self, content):
        """The path of an upload that was taken."""
        return self.upload(content).json()[0]

    def join(self, function, data, **more):
        call = {"fn_index": function, "data": data, "session_hash": self.tab, "event_data": None} | more
        return self.http.post(f"{self.url}/gradio_api/queue/join", json=call)

    def hear(self, tab=None):
        """What the page tells until a call is over."""
        events = []
        with self.http.stream(
            "GET", f"{self.url}/gradio_api/queue/data", params={"session_hash": tab or self.tab}
        ) as got:
            if got.status_code != 200:
                return got.read().decode()
            for line in got.iter_lines():
                if line.startswith("data:"):
                    events.append(json.loads(line[5:]))
                    if events[-1]["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                        break
        return events

    def call(self, function, data, **more):
        """What comes of a call: a text without the call's own, random name."""
        joined = self.join(function, data, **more)
        if joined.status_code != 200:
            return f"{joined.status_code} {joined.text}"
        last = next(event for event in self.hear() if event["msg"] in ("process_completed", "unexpected_error"))
        return json.dumps({"success": last.get("success"), "output": last.get("output")})

    def ask(self, question, path=None):
        """A question as the page puts it, and its answer."""
        image = path and {"path": path, "meta": META}
        put = json.loads(self.call(self.put, [question, image]))
        assert put["success"], put
        return self.call(self.answer, ["minigpt4_tiny", 1, 0, 0.9, 5, 1.05])


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny_section):
    folder = tmp_path_factory.mktemp("page")
    model = tiny_section(arch="minigpt4", model_type="pretrain_vicuna0", end_sym="###")
    config = folder / "eval.yaml"
    config.write_text(yaml.safe_dump({"model": model, "datasets": {}, "run": {"task": "image_text_pretrain"}}))
    running = Page(config, folder / "temporary")
    yield running
    assert "Traceback" not in running.end()
    assert running.process.returncode == 0


@pytest.fixture
def visitor(page):
    return Visitor(page.url)


@pytest.fixture
def attacker(page):
    return Visitor(page.url)


@pytest.fixture(autouse=True)
def unharmed(page, parity_dir):
    """After each test an honest visitor is answered, and no client's fault is a traceback in the log."""
    before = page.peak
    yield
    honest = Visitor(page.url)
    picture = (parity_dir / "images" / "img0_rgb_nonsquare.png").read_bytes()
    assert "tokens read" in honest.ask("What is this?", honest.given(picture))
    honest.call(honest.functions["click", "clear"], [])
    assert "Traceback" not in page.log
    assert page.peak - before < 400 * MIB


@pytest.fixture
def secret(tmp_path):
    """A picture of the server's, of a colour that no other has."""
    path = tmp_path / "secret.png"
    Image.new("RGB", (64, 64), (12, 200, 77)).save(path)
    return path


def ways_to(secret, page):
    """Names of a file that exists, or of none, as an attacker may write them."""
    (secret.parent / "link.png").symlink_to(secret)
    os.mkfifo(secret.parent / "pipe.png")
    up = "../" * 20
    return {
        "file": str(secret),
        "none": str(secret.parent / "none.png"),
        "folder": str(secret.parent),
        "link": str(secret.parent / "link.png"),
        "pipe": str(secret.parent / "pipe.png"),
        "endless": "/dev/zero",
        "standard input": "/dev/stdin",
        "own memory": "/proc/self/mem",
        "passwords": "/etc/passwd",
        "relative": os.path.relpath(secret, REPOSITORY),
        "above the uploads": f"{page.temporary}/{up}{secret}",
        "from the uploads": f"{page.temporary}/x/../../{secret.relative_to(page.temporary.parent.parent)}",
        "address": f"file://{secret}",
        "outside": "http://192.0.2.1/x.png",
        "own address": f"{page.url}/gradio_api/file={secret}",
        "data": "data:image/png;base64,AAAA",
        "code": "README.md",
        "zero": f"{secret}\0.png",
        "half": "\udc80",
        "long": "a/" * 5000,
        "dot": ".",
    }


@pytest.mark.parametrize("marked", [False, True], ids=["bare", "marked"])
def test_a_path_of_the_server_is_no_image_and_does_not_tell_whether_it_exists(page, attacker, secret, marked):
    told = set()
    for path in ways_to(secret, page).values():
        image = {"path": path, "url": path, "orig_name": path} | ({"meta": META} if marked else {})
        for function, data in ((attacker.put, ["What is this?", image]), (attacker.check, [image])):
            call = json.dumps({"fn_index": function, "data": data, "session_hash": attacker.tab})
            reply = attacker.http.post(
                f"{page.url}/gradio_api/queue/join", content=call, headers={"content-type": "application/json"}
            )
            if reply.status_code == 200:
                events = [event for event in attacker.hear() if event["msg"] in ("process_completed", "log")]
                told.add(json.dumps([(event.get("success"), event.get("log")) for event in events]))
                assert "/" not in json.dumps([event.get("output", {}).get("error") for event in events])
            else:
                assert 400 <= reply.status_code < 500
                assert str(secret) not in reply.text
    assert len(told) <= 2  # one answer of each function, whatever the path
    history = json.loads(attacker.call(attacker.functions["click",], []))
    assert "secret" not in json.dumps(history)


def test_a_path_of_the_server_is_not_given_out(page, attacker, secret):
    told = set()
    for way in ways_to(secret, page).values():
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/gradio_api/proxy="):
            try:
                reply = attacker.http.get(f"{page.url}{route}{way}")
            except (httpx.InvalidURL, UnicodeEncodeError):
                continue
            assert 400 <= reply.status_code < 500, (route, way)
            assert b"root:" not in reply.content
            if reply.request.url.path.startswith("/gradio_api/file="):
                told.add((reply.status_code, reply.text))
    assert len(told) == 1


def test_there_is_no_way_out_of_the_pages_own_files(page, attacker):
    for path in ("/static/%2e%2e/%2e%2e/routes.py", "/assets/..%2f..%2f..%2froutes.py", "/..%2fpage.py"):
        reply = attacker.http.get(f"{page.url}{path}")
        assert 400 <= reply.status_code < 500
        assert "import" not in reply.text


def test_what_another_visitor_sent_is_nobody_elses(page, visitor, attacker, secret):
    path = visitor.given(secret.read_bytes())
    unused = visitor.given(secret.read_bytes())
    shown = re.search(
        r'"path": "([^"]+\.jpg)"',
        visitor.ask("What is this?", path) + visitor.call(visitor.edit, [], event_data={"index": 1, "value": "And?"}),
    )[1]
    for other in (path, unused, shown):
        assert attacker.http.get(f"{page.url}/gradio_api/file={other}").status_code == 403
        assert visitor.http.get(f"{page.url}/gradio_api/file={other}").status_code == 200
        image = {"path": other, "meta": META}
        assert json.loads(attacker.call(attacker.put, ["What is this?", image]))["success"] is False
        tab = Visitor(page.url)  # without the cookie of the first
        assert json.loads(tab.call(tab.put, ["What is this?", image]))["success"] is False


def test_nobody_acts_or_listens_in_anothers_name(page, visitor, attacker):
    visitor.ask("Nobody else may read this?")
    mine, attacker.tab = attacker.tab, visitor.tab
    assert attacker.join(attacker.put, ["Mine?", None]).status_code == 404
    assert attacker.http.get(f"{page.url}/gradio_api/heartbeat/{visitor.tab}").status_code == 404
    assert "no such session" in attacker.hear()
    for function in range(20):
        for route in ("run/predict", "queue/join"):
            call = {"fn_index": function, "data": [], "session_hash": visitor.tab}
            reply = attacker.http.post(f"{page.url}/gradio_api/{route}", json=call)
            assert 400 <= reply.status_code < 500
            assert "Nobody else" not in reply.text
    body = {"session_hash": visitor.tab, "fn_index": visitor.answer, "event_id": "x"}
    assert attacker.http.post(f"{page.url}/gradio_api/cancel", json=body).status_code == 404
    attacker.tab = mine
    assert "Nobody else" in visitor.call(visitor.functions["click", "retry"], [])


CALLS = [
    {"fn_index": 10**30},
    {"fn_index": -1},
    {"fn_index": None},
    {"fn_index": "1"},
    {"fn_index": True},
    {"data": None},
    {"data": {}},
    {"data": ["What?"]},
    {"data": ["What?", None, None]},
    {"data": [{"path": "/etc/passwd", "meta": META}, None]},
    {"data": [["What?"], None]},
    {"data": [5, None]},
    {"data": ["What?", "/etc/passwd"]},
    {"data": ["What?", {"path": ["/etc/passwd"]}]},
    {"data": ["What?", {"path": None}]},
    {"data": ["What?", {"url": "http://192.0.2.1/"}]},
    {"data": ["What?", {"path": "x", "meta": "y"}]},
    {"data": ["What?", [{"path": "x"}]]},
    {"data": ["What?", 1e308]},
    {"session_hash": None},
    {"session_hash": ""},
    {"session_hash": "../../x"},
    {"session_hash": "x" * 5000},
    {"session_hash": {"a": 1}},
    {"batched": True, "data": [["What?"], [None]]},
    {"function": "answer", "data": ["minigpt4_tiny", 1, 0, 0.9, 10**400, 1.05]},
    {"function": "answer", "data": ["minigpt4_tiny", 1, 0, float("nan"), 5, 1.05]},
    {"function": "answer", "data": ["minigpt4_tiny", 1, 0, float("-inf"), 5, 1.05]},
    {"function": "answer", "data": ["minigpt4_tiny", "1", 0, 0.9, 5, 1.05]},
    {"function": "answer", "data": ["minigpt4_tiny", None, 0, 0.9, 5, 1.05]},
    {"function": "answer", "data": ["/etc/passwd", 1, 0, 0.9, 5, 1.05]},
    {"function": "answer", "data": [["minigpt4_tiny"], 1, 0, 0.9, 5, 1.05]},
    {"function": "example", "data": [10**9]},
    {"function": "example", "data": [-1]},
    {"function": "example", "data": ["0"]},
    {"function": "edit", "data": []},
    {"function": "edit", "data": [], "event_data": []},
    {"function": "edit", "data": [], "event_data": {"index": "0", "value": "x"}},
    {"function": "edit", "data": [], "event_data": {"index": 0, "value": {"path": "/etc/passwd"}}},
    {"function": "edit", "data": [], "event_data": {"index": 10**40, "value": "x"}},
    {"function": "edit", "data": [], "event_data": {"index": -5, "value": "x"}},
    {"function": "edit", "data": [], "event_data": {"index": [0, 0], "value": "x"}},
]
"""What is wrong in a call that is right otherwise."""


@pytest.mark.parametrize("route", ["queue/join", "run/predict"])
def test_a_call_of_wrong_types_is_refused(page, attacker, route):
    for call in CALLS:
        function = {"fn_index": getattr(attacker, call.get("function", "put"))}
        body = {"data": ["What?", None], "session_hash": attacker.tab} | function | call
        reply = attacker.http.post(
            f"{page.url}/gradio_api/{route}", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        if reply.status_code == 200:  # it is refused where it is done
            last = next(event for event in attacker.hear() if event["msg"] == "process_completed")
            assert last["success"] is False, call
        else:
            assert 400 <= reply.status_code < 500, call


BODIES = [
    b"",
    b"[]",
    b"null",
    b"{",
    b"\xff\xfe",
    b'{"data": ["\\ud800", null], "fn_index": 1, "session_hash": "half"}',
    b'{"event_id": "\\ud800", "fn_index": 1, "session_hash": "half"}',
    b"[" * 400_000,
    b'{"data": ' + b'{"a":' * 100_000,
    b'{"fn_index": 1' + b"0" * 900_000 + b"}",
    b'{"data": ["' + b"x" * (40 << 20) + b'"]}',
]


@pytest.mark.parametrize("route", ["queue/join", "run/predict", "cancel", "reset"])
def test_a_body_that_is_no_call_is_refused(page, attacker, route):
    for body in BODIES:
        headers = {"content-type": "application/json"}
        try:
            reply = attacker.http.post(f"{page.url}/gradio_api/{route}", content=body, headers=headers)
        except (httpx.WriteError, httpx.ReadError):
            continue  # the connection was closed before all of it was sent
        assert 400 <= reply.status_code < 500, body[:50]


def test_a_question_longer_than_may_be_is_refused(attacker):
    assert json.loads(attacker.call(attacker.put, ["x" * 200_000, None]))["success"] is False


UNNEEDED = [
    ("POST", "component_server"),
    ("POST", "process_recording"),
    ("POST", "vibe-edit"),
    ("POST", "call/put"),
    ("POST", "stream/x"),
    ("GET", "deep_link?session_hash=x"),
    ("GET", "proxy=http://192.0.2.1/"),
    ("GET", "custom_component/x/client/y/z"),
    ("GET", "stream/a/b/1/playlist-file"),
    ("GET", "run-history/buckets"),
    ("GET", "queue/data"),
    ("GET", "queue/data?session_hash=nobody"),
    ("GET", "../monitoring"),
    ("GET", "../dev/reload"),
    ("PUT", "upload"),
    ("DELETE", "file=/etc/passwd"),
]


def test_what_the_page_does_not_need_is_not_there(page, attacker):
    for method, path in UNNEEDED:
        reply = attacker.http.request(method, f"{page.url}/gradio_api/{path}", json={} if method == "POST" else None)
        assert 400 <= reply.status_code < 500, path


NO_UPLOADS = [
    {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=a"}},
    {"content": b"--a\r\n\r\nx\r\n--a--\r\n", "headers": {"content-type": "multipart/form-data; boundary=a"}},
    {"content": b"x", "headers": {"content-type": "text/plain"}},
    {"content": b"x", "headers": {b"content-type": b"\xff"}},
    {"content": iter([b"x" * 1000])},
    {"json": {"files": "/etc/passwd"}},
    {"data": {"files": "/etc/passwd"}},
    {"files": [("files", b"x"), ("files", b"y")]},
    {"files": {"other": b"x"}},
    {"files": {"files": ("heavy.png", bytes(3 * MIB))}},
]


def test_an_upload_that_is_no_file_is_refused_and_leaves_nothing(page, attacker):
    before = page.stored
    for sent in NO_UPLOADS:
        assert 400 <= attacker.http.post(f"{page.url}/gradio_api/upload", **sent).status_code < 500, sent
    assert page.stored == before


def test_the_name_of_an_upload_says_nothing_about_its_place(page, attacker):
    for name in ("../../../x.png", "/etc/x.png", "x.html", "a" * 5000, "", "\x01.png", "…"):
        reply = attacker.upload(b"<script>alert(1)</script>", name)
        if reply.status_code == 200:
            path = Path(reply.json()[0])
            assert page.temporary in path.parents
            seen = attacker.http.get(f"{page.url}/gradio_api/file={path}")
            assert seen.headers["content-type"] == "application/octet-stream"
        else:
            assert reply.status_code == 400


def test_a_visitor_may_send_so_much_and_again_when_he_has_gone(page, attacker):
    before, half = page.stored, bytes(MIB + MIB // 2)

    def fill():
        replies = [attacker.upload(half) for _ in range(20)]
        assert [reply.status_code for reply in replies] == [200] * 10 + [413] * 10
        assert "Restart" in replies[-1].text
        assert 15 * MIB <= page.stored - before <= 17 * MIB

    fill()
    with attacker.http.stream("GET", f"{page.url}/gradio_api/heartbeat/{attacker.tab}") as alive:
        next(alive.iter_lines())
    for _ in range(600):
        if page.stored - before < MIB:
            break
        threading.Event().wait(0.05)
    fill()
    attacker.call(attacker.functions["click", "clear"], [])
    assert page.stored - before < MIB


def test_many_visitors_may_not_send_more_than_there_is_room_for(page):
    before = page.stored
    crowd = [Visitor(page.url) for _ in range(12)]
    statuses = [one.upload(bytes(IMAGE_MIB * MIB)).status_code for one in crowd for _ in range(7)]
    assert statuses.count(503) > 0
    assert page.stored - before <= 129 * MIB
    for one in crowd:
        with one.http.stream("GET", f"{page.url}/gradio_api/heartbeat/{one.tab}") as alive:
            next(alive.iter_lines())
    for _ in range(600):
        if page.stored - before < MIB:
            return
        threading.Event().wait(0.05)
    pytest.fail("what those sent who have gone is still there")


def test_small_files_count_too(page, attacker):
    statuses = [attacker.upload(b"x").status_code for _ in range(300)]
    assert statuses.count(200) == 256
    attacker.call(attacker.functions["click", "clear"], [])


def begun(page, body, cookie=""):
    """An upload as large as an image may be, of which so much came."""
    host, port = page.url.removeprefix("http://").split(":")
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {IMAGE_MIB * MIB}\r\nCookie: {cookie}\r\n"
    client = socket.create_connection((host, int(port)), timeout=30)
    client.sendall(f"{head}Content-Type: multipart/form-data; boundary=a\r\n\r\n".encode() + body)
    return client


def test_an_upload_that_is_never_ended_leaves_nothing(page, attacker):
    before = page.stored
    part = b'--a\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
    for _ in range(30):
        begun(page, part + bytes(500_000)).close()
    assert attacker.upload(b"x").status_code == 200
    assert page.stored - before < MIB


def test_uploads_that_do_not_come_take_nobodys_room(page, visitor):
    given = [one.http.cookies["minigpt4_visitor"] for one in (visitor, *(Visitor(page.url) for _ in range(9)))]
    names = given + [uuid.uuid4().hex for _ in range(10)]
    idle = [begun(page, b"", f"minigpt4_visitor={name}") for name in names for _ in range(10)]
    for sender in (visitor, Visitor(page.url)):
        assert sender.upload(bytes(MIB)).status_code == 200
        sender.call(sender.functions["click", "clear"], [])
    for client in idle:
        assert client.recv(100).startswith(b"HTTP/1.1 408")
        client.close()


def test_a_cookie_that_was_not_given_here_makes_no_visitor(attacker):
    given, statuses = attacker.http.cookies["minigpt4_visitor"], []
    for number in range(20):
        attacker.http.cookies.clear()
        name = uuid.uuid4().hex
        attacker.http.cookies.set("minigpt4_visitor", name if number % 2 else name + given[32:])
        statuses.append(attacker.upload(bytes(MIB + MIB // 2)).status_code)
    assert statuses == [200] * 10 + [413] * 10
    attacker.call(attacker.functions["click", "clear"], [])


def test_who_does_not_read_the_answers_may_not_ask_for_ever(page, attacker):
    statuses, before = set(), page.peak
    for _ in range(2000):
        statuses.add(attacker.join(attacker.put, ["x" * 20_000, None]).status_code)
    assert statuses <= {200, 429, 503}  # 503: the queue is full
    assert 429 in statuses
    assert page.peak - before < 100 * MIB


def test_images_that_are_shown_do_not_pile_up(page, attacker, make_png):
    before = sum(1 for _ in page.temporary.rglob("*"))
    for side in range(10, 30):
        path = attacker.given(make_png(side, side))
        attacker.call(attacker.put, ["What?", {"path": path}])
        attacker.call(attacker.functions["click", "clear"], [])
    assert sum(1 for _ in page.temporary.rglob("*")) - before < 5


def test_a_bad_image_is_told_and_taken_out_of_the_box(attacker, hostile_images):
    for name, content in hostile_images.items():
        path = attacker.given(content)
        assert attacker.join(attacker.check, [{"path": path, "meta": META}]).status_code == 200
        events = attacker.hear()
        assert next(event["log"] for event in events if event["msg"] == "log"), name
        assert events[-1]["output"]["data"] == [None], name
