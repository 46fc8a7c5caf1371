"""Who may ask."""

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.serving.address import is_local, listen
from minigpt4.serving.api.access import Access
from minigpt4.serving.api.app import KEY_VARIABLE, api_key

KEY = "sk-something-secret"


@pytest.fixture
def locked(serve):
    return serve(access=Access(KEY, local_only=False))


def test_the_key_opens_everything_and_is_never_shown(locked):
    client = locked.client()
    assert client.models.list().data
    assert client.chat.completions.create(model="first", messages=[{"role": "user", "content": "a"}], max_tokens=2)
    assert KEY not in repr(Access(KEY))


def test_a_wrong_key_opens_nothing_but_health(locked):
    for header in ("", "Bearer ", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff"):
        for path in ("/v1/models", "/v1/models/first", "/v1/chat/completions"):
            answer = locked.ask("POST" if "chat" in path else "GET", path, b"{}", {"Authorization": header})
            assert answer.status == 401, (header, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.content.decode()
            assert "the API key is missing or wrong" in answer.error["message"]
        assert locked.ask("GET", "/healthz", headers={"Authorization": header}).status == 200


def test_without_a_key_this_machine_is_answered_and_no_web_page(server):
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "LOCALHOST"):
        assert server.get("/v1/models", Host=host).status == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "8.8.8.8"):  # names that were made to point here
        answer = server.get("/v1/models", Host=host)
        assert answer.status == 403
        assert KEY_VARIABLE in answer.error["message"]
    assert server.post(b"{}", **{"Content-Type": "text/plain"}).status == 415  # sent without being asked


def test_the_key_is_that_of_the_environment_and_one_that_nobody_can_send_an_error(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert api_key() is None
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert api_key() == KEY
    for value in ("", "two words", "line\n", "schl\xfcssel"):
        monkeypatch.setenv(KEY_VARIABLE, value)
        with pytest.raises(ConfigError, match=KEY_VARIABLE) as error:
            api_key()
        assert not value or value not in str(error.value)


def test_an_address_that_is_taken_is_an_error_before_anything_loads():
    with listen("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(ConfigError, match="choose another --port"):
            listen("127.0.0.1", first.getsockname()[1])
        assert is_local(first)
    with listen("0.0.0.0", 0) as everywhere:
        assert not is_local(everywhere)
