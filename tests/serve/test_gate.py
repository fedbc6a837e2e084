"""What a request passes first: id, Host, key, body; and nothing secret in logs."""

import logging
import socket

import httpx
import pytest

from dsv3.serve.app import create_app
from dsv3.serve.settings import ApiKey, ServeSettings
from tests.serve.small import post, running, small_app, small_engine

KEYS = (
    ApiKey(name="ann", secret="sk-ann-secret"),
    ApiKey(name="bob", secret="sk-bob-secret", max_concurrent=1, tokens_per_minute=400),
)
TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded():
    settings = ServeSettings(
        model="tiny", keys=KEYS, max_body_bytes=5000, body_timeout_s=0.5, origins=("https://chat.example.org",)
    )
    with running(small_app(settings)) as url:
        yield url


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{name}-secret"}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/models/tiny", "/metrics", "/tokenizer_info", "/user/balance", "/v1/models/x/y"]
)
def test_paths_need_a_key(guarded, path):
    answer = httpx.get(guarded + path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(guarded + path, headers=bearer("ann")).status_code in (200, 404)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/beta/completions", "/tokenize", "/detokenize"])
def test_a_body_is_not_read_without_a_key(guarded, path):
    assert post(guarded, path, TEXT).status_code == 401
    assert httpx.post(guarded + path, content=b"x" * 100_000).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json"])
def test_paths_that_need_none(guarded, path):
    assert httpx.get(guarded + path).status_code == 200


def test_a_body_beyond_the_limit_is_refused_while_it_arrives(guarded):
    def stream():
        for _ in range(100):
            yield b'{"a": "' + b"x" * 1000

    for content in (b"x" * 6000, stream()):
        answer = httpx.post(f"{guarded}/v1/completions", content=content, headers=bearer("ann"))
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_a_body_that_dawdles_is_cut_off(guarded):
    host, port = guarded.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-ann-secret\r\n"
        connection.sendall((head + "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{").encode())
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def test_the_request_id_comes_back_on_everything(guarded):
    for path in ("/health", "/v1/models", "/nothing"):
        assert httpx.get(guarded + path).headers["x-request-id"].startswith("req_")
    assert httpx.get(f"{guarded}/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    odd = httpx.get(f"{guarded}/health", headers={"x-request-id": "a b;c"}).headers["x-request-id"]
    assert odd.startswith("req_")


def test_cross_origin_only_for_named_origins(guarded, url):
    asked = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type"
    allowed = httpx.options(f"{guarded}/v1/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
    other = httpx.options(f"{guarded}/v1/chat/completions", headers={**asked, "origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=asked).headers


def test_without_keys_only_names_of_this_machine_are_answered(url, guarded):
    assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example.org"}).status_code == 403
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == 200
    assert httpx.get(f"{guarded}/health", headers={"host": "api.example.org"}).status_code == 200


def test_without_keys_no_web_page_elsewhere_can_ask_even_without_reading_the_answer(url, guarded):
    # A script may send a body without a content type to any address: no preflight, and the server would work for it.
    for origin in ("https://evil.example.org", "http://127.0.0.1.evil.example.org", "null"):
        refused = post(url, "/v1/completions", TEXT, headers={"origin": origin})
        assert refused.status_code == 403
        assert "origins" in refused.json()["error"]["message"]
    for origin in (url, "http://localhost:3000", "http://[::1]:8000"):
        assert post(url, "/v1/completions", TEXT, headers={"origin": origin}).status_code == 200
    named = ServeSettings(model="tiny", origins=("https://chat.example.org",))
    with running(small_app(named)) as open_to_one:
        headers = {"origin": "https://chat.example.org"}
        assert post(open_to_one, "/v1/completions", TEXT, headers=headers).status_code == 200
    with_key = {**bearer("ann"), "origin": "https://evil.example.org"}
    assert post(guarded, "/v1/completions", TEXT, headers=with_key).status_code == 200


def test_a_key_has_limits_of_its_own(guarded):
    too_long = post(guarded, "/v1/completions", {**TEXT, "prompt": [5] * 500}, headers=bearer("bob"))
    assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "prompt")
    asked = {**TEXT, "prompt": [5] * 300, "max_tokens": 1}
    assert post(guarded, "/v1/completions", asked, headers=bearer("bob")).status_code == 200
    answer = post(guarded, "/v1/completions", asked, headers=bearer("bob"))
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert post(guarded, "/v1/completions", asked, headers=bearer("ann")).status_code == 200


def test_keys_do_not_share_cached_prompts(guarded):
    prompt = {"model": "tiny", "prompt": list(range(5, 105)), "max_tokens": 1}
    first, second = (post(guarded, "/v1/completions", prompt, headers=bearer("ann")).json()["usage"] for _ in range(2))
    assert (first["prompt_cache_hit_tokens"], second["prompt_cache_hit_tokens"]) == (0, 64)
    keys = (*KEYS[:1], ApiKey(name="eve", secret="sk-eve-secret"))
    with running(small_app(ServeSettings(model="tiny", keys=keys))) as url:
        for name in ("ann", "eve"):
            usage = post(url, "/v1/completions", prompt, headers=bearer(name)).json()["usage"]
            assert usage["prompt_cache_hit_tokens"] == 0


def test_logs_hold_neither_keys_nor_prompts(guarded, caplog):
    with caplog.at_level(logging.DEBUG):
        post(guarded, "/v1/completions", {**TEXT, "prompt": "a very private word"}, headers=bearer("ann"))
        post(guarded, "/v1/completions", {**TEXT, "prompt": "a very private word", "top_p": 7}, headers=bearer("ann"))
        httpx.get(f"{guarded}/v1/models", headers={"authorization": "Bearer sk-wrong-secret"})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("dsv3", "uvicorn"))]
    assert any("/v1/completions 200" in line and "ann" in line for line in ours)
    assert not any("private" in line or "secret" in line for line in ours)


def test_an_app_for_an_open_address_needs_keys():
    engine, tokenizer = small_engine()
    with pytest.raises(ValueError, match="API key"):
        create_app(engine, tokenizer, host="0.0.0.0")
