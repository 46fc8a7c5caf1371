"""Images from other servers: what is allowed comes, and nothing else is ever connected to.

Servers of a test are on this machine, which the product never connects to. So tests hand in their own names and their
own rule of what is public; those that show the real rule leave it as it is.
"""

import asyncio
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.serving.api.access import ApiError, ApiLimits
from minigpt4.serving.api.images import AllowedHosts, CheckedNetwork, RemoteImages, is_public
from minigpt4.serving.api.schema import ByteBudget
from minigpt4.serving.uploads import TooLargeError

INNER = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.8",
    "192.88.99.1",
    "198.18.0.1",
    "224.0.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "64:ff9b::a00:1",
    "64:ff9b:1::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "3fff::1",
    "fc00::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]


class Site(BaseHTTPRequestHandler):
    """Answers every path in its own bad or good way, and writes down that it was asked."""

    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        way = urlsplit(self.path).path.strip("/")
        getattr(self, way)(parse_qs(urlsplit(self.path).query))

    def image(self, query, **headers):
        content = self.server.image * int(query.get("times", ["1"])[0])
        self.send_response(200)
        for name, value in ({"Content-Type": "image/png", "Content-Length": str(len(content))} | headers).items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def silent_length(self, query):
        self.image(query, **{"Content-Length": ""})

    def page(self, query):
        self.image(query, **{"Content-Type": "text/html; charset=utf-8"})

    def packed(self, query):
        self.image(query, Content_Encoding="gzip")

    def moved(self, query):
        self.send_response(302)
        self.send_header("Location", query["to"][0])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def around(self, query):
        self.moved({"to": ["/around"]})

    def missing(self, query):
        self.send_error(404)

    def late(self, query):
        self.server.leave.wait(30)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(small_image):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.image, server.asked, server.leave, server.daemon_threads = small_image, [], threading.Event(), True
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield server
    server.leave.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def port(site):
    return site.server_address[1]


class Names:
    """A name service: `images.test` and `other.test` are 127.0.0.1, which counts as public; the rest is inner."""

    def __init__(self, **addresses):
        self.addresses = {"images.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]} | addresses
        self.asked = []

    async def resolve(self, host, port):
        self.asked.append(host)
        return self.addresses[host]

    def network(self):
        return CheckedNetwork(self.resolve, is_allowed=lambda address: address == "127.0.0.1")


def fetch(url, hosts, network=None, **limits):
    """The bytes behind a URL, by a fetcher that is used once."""
    chosen = ApiLimits(**limits)

    async def run():
        with ByteBudget(chosen.held_bytes).reserve() as held:
            return await RemoteImages(AllowedHosts(hosts), chosen, network).fetch(url, held)

    return asyncio.run(run())


# What comes


@pytest.mark.parametrize(
    "way", ["image", "silent_length", "moved?to=/image", "moved?to=http://other.test:{port}/image"]
)
def test_an_image_of_an_allowed_host_comes(site, port, way):
    hosts = [f"images.test:{port}", f"Other.Test:{port}"]
    content = fetch(f"http://images.test:{port}/{way.format(port=port)}", hosts, Names().network())
    assert content == site.image
    assert site.asked[0][0] == f"images.test:{port}"


def test_the_server_answers_about_it(serve, tools, site, port):
    names = Names()
    server = serve(remote=lambda limits: RemoteImages(AllowedHosts([f"images.test:{port}"]), limits, names.network()))
    part = {"type": "image_url", "image_url": {"url": f"http://images.test:{port}/image", "detail": "low"}}
    remote = server.chat([part, tools.said("What is this?")])
    assert remote.status == 200
    assert remote.text == server.chat([tools.picture(site.image), tools.said("What is this?")]).text
    refused = server.chat([{"type": "image_url", "image_url": {"url": "http://inner.test/image"}}])
    assert refused.status == 400
    assert refused.error["param"] == "messages[0].content[0].image_url.url"
    assert refused.error["code"] == "invalid_image_url"


# What is never connected to


@pytest.mark.parametrize("address", INNER)
def test_an_inner_address_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "151.101.1.69", "2606:4700::1111"])
def test_an_address_of_the_internet_is_public(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_this_machine_is_refused_even_when_it_is_allowed_by_name(site, port, host):
    with pytest.raises(ApiError, match="not public"):
        fetch(f"http://{host}:{port}/image", [f"{host}:{port}"])
    assert site.asked == []


def test_one_inner_address_among_others_is_enough_to_refuse(site, port):
    names = Names(**{"images.test": ["127.0.0.1", "127.0.0.2"]})
    with pytest.raises(ApiError, match="not public"):
        fetch(f"http://images.test:{port}/image", [f"images.test:{port}"], names.network())
    assert site.asked == []


def test_a_name_is_looked_up_once_and_its_checked_address_connected_to(site, port):
    class Rebinding(Names):
        async def resolve(self, host, port):
            await super().resolve(host, port)
            return ["127.0.0.1"] if len(self.asked) == 1 else ["127.0.0.2"]

    names = Rebinding()
    assert fetch(f"http://images.test:{port}/image", [f"images.test:{port}"], names.network()) == site.image
    assert names.asked == ["images.test"]


def test_a_redirect_to_an_inner_address_is_refused(site, port):
    names = Names(**{"inner.test": ["127.0.0.2"]})
    hosts = [f"images.test:{port}", f"inner.test:{port}"]
    with pytest.raises(ApiError, match="not public"):
        fetch(f"http://images.test:{port}/moved?to=http://inner.test:{port}/image", hosts, names.network())
    assert len(site.asked) == 1


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://other.test:{port}/image", "not allowed here"),
        ("http://127.0.0.1:{port}/image", "not allowed here"),
        ("//localhost:{port}/image", "not allowed here"),
        ("http://images.test/image", "not allowed here"),
        ("file:///etc/passwd", "must begin with"),
        ("gopher://images.test:{port}/", "must begin with"),
        ("data:image/png;base64,AAAA", "must begin with"),
    ],
)
def test_a_redirect_to_what_may_not_be_asked_is_refused(site, port, target, reason):
    url = f"http://images.test:{port}/moved?to={target.format(port=port)}"
    with pytest.raises(ApiError, match=reason):
        fetch(url, [f"images.test:{port}"], Names().network())
    assert len(site.asked) == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://images.test/x", "not allowed here"),
        ("https://images.test:{port}/x", None),
        ("http://images.test.evil.test:{port}/x", "not allowed here"),
        ("http://evil.test:{port}/images.test", "not allowed here"),
        ("http://images.test:{port}@evil.test/x", "user name"),
        ("http://evil.test\\@images.test:{port}/x", "user name"),
        ("http://2130706433:{port}/x", "not allowed here"),
        ("http://images.test:99999/x", "no URL"),
        ("http://[::1/x", "no URL"),
        ("ftp://images.test:{port}/x", "must begin with"),
        ("file:///etc/passwd", "must begin with"),
        ("/etc/passwd", "must begin with"),
        ("", "must begin with"),
        ("http://images.test:{port}/x\r\nHost: evil", "blanks or signs"),
        ("http://im\u00e4ges.test:{port}/x", "blanks or signs"),
    ],
)
def test_a_url_that_may_not_be_asked_is_refused_without_a_connection(site, port, url, reason):
    names = Names()
    with pytest.raises(ApiError, match=reason or "does not answer as it should"):
        fetch(url.format(port=port), [f"images.test:{port}"], names.network())
    assert site.asked == []
    assert names.asked == ([] if reason else ["images.test"])


def test_ports_of_the_web_belong_to_a_host_without_port():
    hosts = AllowedHosts(["images.test"])
    assert hosts.place("https://IMAGES.test./a?b=c#d").url.target == b"/a?b=c"
    assert hosts.place("http://images.test:80").port == 80
    with pytest.raises(ApiError):
        hosts.place("http://images.test:443/")


@pytest.mark.parametrize(
    "host", ["", "*", "*.test", "http://images.test", "images.test/x", "a b:c", "a@b", "b\u00fccher.test"]
)
def test_an_allowed_host_must_be_a_name(host):
    with pytest.raises(ConfigError, match="--allow-image-host"):
        AllowedHosts([host])


def test_proxies_of_the_environment_are_not_asked(site, port, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(f"http://images.test:{port}/image", [f"images.test:{port}"], Names().network()) == site.image


# What is no image, too much, too late


@pytest.mark.parametrize(
    ("way", "limits", "reason"),
    [
        ("page", {}, "no image but text/html"),
        ("packed", {}, "compresses"),
        ("missing", {}, "status 404"),
        ("around", {}, "more than 3 redirects"),
        ("late", {"fetch_seconds": 0.3}, "did not come within 0.3 s"),
    ],
)
def test_what_does_not_come_as_an_image_is_refused(site, port, way, limits, reason):
    with pytest.raises(ApiError, match=reason):
        fetch(f"http://images.test:{port}/{way}", [f"images.test:{port}"], Names().network(), **limits)


@pytest.mark.parametrize("way", ["image", "silent_length"])
def test_too_many_bytes_are_not_read_to_their_end(port, way):
    with pytest.raises(TooLargeError):
        fetch(
            f"http://images.test:{port}/{way}?times=1000", [f"images.test:{port}"], Names().network(), image_bytes=500
        )


def test_a_host_that_does_not_listen_or_exist_is_an_error(port):
    with pytest.raises(ApiError, match="does not answer"):
        fetch("http://images.test:9/image", ["images.test:9"], Names().network())

    async def unknown(host, port):
        raise OSError("no such name")

    with pytest.raises(ApiError, match="not known"):
        fetch("http://images.test:9/image", ["images.test:9"], CheckedNetwork(unknown))
