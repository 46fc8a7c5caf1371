"""Who may ask."""

import openai
import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.serving.api.access import Access
from minigpt4.serving.api.app import KEY_VARIABLE, api_key, is_local, listen

KEY = "sk-something-secret"


@pytest.fixture
def locked(serve):
    return serve(access=Access(KEY, local_only=False))


def test_the_key_opens_everything(locked):
    client = locked.client()
    assert client.models.list().data
    assert client.chat.completions.create(model="first", messages=[{"role": "user", "content": "a"}], max_tokens=2)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/first", "/v1/chat/completions"])
@pytest.mark.parametrize("header", ["", "Bearer ", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff"])
def test_a_wrong_key_opens_nothing(locked, path, header):
    answer = locked.ask("POST" if "chat" in path else "GET", path, b"{}", {"Authorization": header})
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.content.decode()


def test_the_official_client_knows_the_error(locked):
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        openai.OpenAI(base_url=locked.url, api_key="wrong", max_retries=0).models.list()


def test_health_is_open(locked):
    assert locked.ask("GET", "/healthz", headers={"Authorization": ""}).status == 200


def test_the_key_is_never_shown():
    assert KEY not in repr(Access(KEY))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "[::1]:8000", "LOCALHOST"])
def test_without_a_key_names_of_this_machine_are_answered(server, host):
    assert server.get("/v1/models", Host=host).status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "8.8.8.8"])
def test_without_a_key_a_name_that_was_made_to_point_here_is_not(server, host):
    answer = server.get("/v1/models", Host=host)
    assert answer.status == 403
    assert KEY_VARIABLE in answer.error["message"]


def test_what_a_web_page_may_send_without_being_asked_is_refused(server):
    answer = server.post(b"{}", **{"Content-Type": "text/plain"})
    assert answer.status == 415


def test_the_key_is_that_of_the_environment(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert api_key() is None
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert api_key() == KEY


@pytest.mark.parametrize("value", ["", "two words", "line\n", "schl\xfcssel"])
def test_a_key_that_nobody_can_send_is_an_error(monkeypatch, value):
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
