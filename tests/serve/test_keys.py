"""API keys: who is let in, what each may use, and what is never told."""

import pytest

from dsv3.serve.errors import ApiError
from dsv3.serve.keys import Keys
from dsv3.serve.settings import ApiKey, ServeSettings, check_bind, is_loopback

ANN, BOB = ApiKey(name="ann", secret="sk-ann-secret"), ApiKey(name="bob", secret="sk-bob-secret")


def test_the_right_key_finds_its_owner_and_others_get_401():
    keys = Keys((ANN, BOB))
    assert keys.owner(b"Bearer sk-bob-secret").name == "bob"
    assert keys.owner(b"bearer  sk-ann-secret ").name == "ann"
    for wrong in (
        None,
        b"",
        b"Bearer",
        b"Bearer sk-bob-secreT",
        b"sk-bob-secret",
        b"Basic sk-bob-secret",
        b"\xff\xfe \xff",
    ):
        with pytest.raises(ApiError) as refused:
            keys.owner(wrong)
        assert refused.value.status == 401
        assert refused.value.headers["www-authenticate"] == "Bearer"
        assert "secret" not in refused.value.message
    assert Keys(()).owner(None).salt == b""


def test_every_comparison_is_made_whichever_key_it_is(monkeypatch):
    import hmac

    made, compare = [], hmac.compare_digest
    monkeypatch.setattr("dsv3.serve.keys.hmac.compare_digest", lambda a, b: made.append(1) or compare(a, b))
    keys = Keys((ANN, BOB))
    keys.owner(b"Bearer sk-ann-secret")
    assert len(made) == 2


def test_salts_differ_by_key_and_hold_no_secret():
    keys = Keys((ANN, BOB))
    salts = {keys.owner(f"Bearer {key.secret}".encode()).salt for key in (ANN, BOB)}
    assert len(salts) == 2
    assert not any(b"secret" in salt for salt in salts)
    assert "secret" not in repr(ServeSettings(keys=(ANN, BOB))) + repr(vars(keys))


def test_concurrent_requests_are_limited_by_key():
    keys = Keys((ApiKey(name="ann", secret=ANN.secret, max_concurrent=1), BOB))
    ann, bob = (keys.owner(f"Bearer {key.secret}".encode()) for key in (ANN, BOB))
    with keys.use(ann, 1):
        with pytest.raises(ApiError) as refused, keys.use(ann, 1):
            pass
        assert refused.value.status == 429
        assert int(refused.value.headers["retry-after"]) >= 1
        with keys.use(bob, 1):
            pass
    with keys.use(ann, 1):
        pass


def test_tokens_a_minute_come_back_with_time():
    now = [0.0]
    keys = Keys((ApiKey(name="ann", secret=ANN.secret, tokens_per_minute=60),), clock=lambda: now[0])
    ann = keys.owner(b"Bearer sk-ann-secret")
    with keys.use(ann, 40):
        keys.spend(ann, 40)  # 20 below empty
    with pytest.raises(ApiError) as refused, keys.use(ann, 10):
        pass
    assert refused.value.status == 429
    assert refused.value.headers["retry-after"] == "30"
    now[0] = 30.0
    with keys.use(ann, 10):
        pass
    with pytest.raises(ApiError) as refused, keys.use(ann, 61):
        pass
    assert refused.value.status == 400  # it would never fit


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_address_needs_a_key(host):
    with pytest.raises(ValueError, match="key"):
        check_bind(host, ServeSettings())
    check_bind(host, ServeSettings(keys=(ANN,)))


def test_this_machine_needs_none():
    for host in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        check_bind(host, ServeSettings())


@pytest.mark.parametrize(
    "wrong",
    [
        dict(keys=(ANN, ApiKey(name="other", secret=ANN.secret))),
        dict(origins=("*",)),
        dict(model=""),
        dict(max_waiting=0),
        dict(send_timeout_s=0),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r": (drop|name|give|.*empty)|empty"):
        ServeSettings(**wrong)


def test_keys_that_cannot_be_are_refused():
    for wrong in (dict(secret="short"), dict(secret="with spaces in it"), dict(secret="long-enough", max_concurrent=0)):
        with pytest.raises(ValueError, match=r"needs at least 8|give 1 or more"):
            ApiKey(**wrong)
