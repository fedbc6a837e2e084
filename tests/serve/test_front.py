"""Routing by known beginnings, retries that lose and double nothing, by replicas that are told to die."""

import asyncio
import json

import httpx
import pytest

from dsv3.serve.front import BLOCK, SLACK, Call, Front, Lost, Router, Start, chain, merge_metrics
from dsv3.serve.settings import ServeSettings

EVENTS = ((b"content-type", b"text/event-stream"),)
JSON = ((b"content-type", b"application/json"), (b"content-length", b"9"))


def call(text, key=b"", path="/v1/completions"):
    return Call("POST", path, b"", ((b"Authorization", key),), json.dumps({"prompt": text}).encode())


class Scripted:
    """A replica that says what it is told: parts, a Lost to raise, an Event to wait for. `down`: cannot be reached."""

    def __init__(self, *parts):
        self.parts, self.down, self.calls, self.closed = parts, False, 0, 0

    async def answer(self, call):
        self.calls += 1
        if self.down:
            raise Lost("down")
        try:
            yield None
            for part in self.parts:
                if isinstance(part, asyncio.Event):
                    await part.wait()
                elif isinstance(part, Lost):
                    self.down = True
                    raise part
                else:
                    yield part
        finally:
            self.closed += 1

    async def alive(self):
        return not self.down


def front(*backends, **options):
    made = Front(ServeSettings(max_body_bytes=4096, drain_s=2.0), wait_s=0.5, **options)
    made.ready(backends)
    return made


def post(app, body=b"{}", path="/v1/completions"):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post(path, content=body)

    return asyncio.run(go())


def test_a_known_beginning_goes_where_it_is_known_unless_that_one_is_busy():
    router, long = Router(3), "a" * BLOCK * 3
    first = router.choose(chain(call(long)))
    router.running[first] += 1
    assert router.choose(chain(call(long + "more"))) == first
    assert router.choose(chain(call("b" * BLOCK))) != first
    router.running[first] += SLACK
    assert router.choose(chain(call(long + "again"))) != first
    router.up = [i != first for i in range(3)]
    assert router.choose(chain(call(long)), tried=[i for i in range(3) if i != first]) is None


def test_a_chain_tells_owners_and_beginnings_apart():
    long = "a" * BLOCK * 2
    assert chain(call(long))[0] == chain(call(long[:BLOCK] + "b"))[0]
    assert chain(call(long))[1] != chain(call(long[:BLOCK] + "b"))[1]
    assert not set(chain(call(long))) & set(chain(call(long, key=b"Bearer other")))
    assert chain(Call("POST", "/", b"", (), b"\xff no json")) == []
    assert chain(Call("POST", "/", b"", (), b"[1]")) == []


def test_a_request_whose_replica_dies_before_an_answer_is_answered_by_another():
    for before in ((), (Start(200, JSON),), (Start(200, JSON), b"\n", b"\n")):
        dying, well = Scripted(*before, Lost("")), Scripted(Start(200, JSON), b'{"a": 1}')
        app = front(dying, well)
        reply = post(app)
        assert reply.json() == {"a": 1}
        assert (dying.calls, well.calls, app.retried) == (1, 1, 1)


def test_comments_of_a_stream_do_not_count_as_an_answer():
    dying = Scripted(Start(200, EVENTS), b": keep-alive\n\n", Lost(""))
    reply = post(front(dying, Scripted(Start(200, EVENTS), b"data: 1\n\n", b"data: [DONE]\n\n")))
    assert reply.text == ": keep-alive\n\ndata: 1\n\ndata: [DONE]\n\n"


def test_half_a_stream_ends_with_an_error_and_is_not_begun_anew():
    well = Scripted(Start(200, EVENTS), b"data: 1\n\n")
    reply = post(front(Scripted(Start(200, EVENTS), b"data: 1\n\n", Lost("")), well))
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
    assert events[0] == 1
    assert "lost" in events[1]["error"]["message"]
    assert "[DONE]" not in reply.text
    assert well.calls == 0


def test_half_a_json_body_is_cut_off():
    with pytest.raises(ConnectionAbortedError):
        post(front(Scripted(Start(200, JSON), b'{"a"', Lost("")), Scripted(Start(200, JSON), b"{}")))


def test_without_any_replica_the_request_is_told_to_come_back():
    one, two = Scripted(Lost("")), Scripted(Lost(""))
    reply = post(front(one, two))
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert (one.calls, two.calls) == (1, 1)


def test_a_replica_that_comes_back_is_used_again():
    one = Scripted(Start(200, JSON), b"{}")
    one.down = True
    app = front(one)

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            asking = asyncio.ensure_future(client.post("/v1/completions", json={}))
            await asyncio.sleep(0.1)
            one.down = False
            app.wait_s = 5
            return await asking

    app.wait_s = 5
    assert asyncio.run(go()).status_code == 200


def test_a_client_that_leaves_ends_its_request_at_the_replica():
    async def go():
        slow = Scripted(Start(200, EVENTS), b"data: 1\n\n", asyncio.Event())
        app, sent, left = front(slow), [], asyncio.Event()
        messages = [{"type": "http.request", "body": b"{}"}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if len(sent) == 2:
                left.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await asyncio.wait_for(app(scope, receive, send), 5)
        assert slow.closed == 1
        assert app.router.running == [0]
        assert app.running == 0

    asyncio.run(go())


def test_limits_and_states_are_answered_here():
    app = front(Scripted(Start(200, JSON), b"{}"))
    assert post(app, b"x" * 5000).status_code == 413
    asyncio.run(app.drain())
    assert post(app).status_code == 503
    loading = Front(ServeSettings())
    assert post(loading).status_code == 503
    assert [post(loading, path=path).status_code for path in ("/health", "/ready")] == [200, 503]


def test_a_body_that_no_parser_reads_is_the_replicas_to_refuse():
    for body in (b"[" * 3000, b'{"prompt": ' + b"[" * 1500 + b"]" * 1500 + b"}", b"\xff", b"{"):
        answer = post(front(Scripted(Start(400, JSON), b"{}")), body)
        assert answer.status_code == 400


def test_a_body_that_dawdles_is_cut_off_and_nothing_is_asked_of_a_replica():
    async def go():
        app = Front(ServeSettings(body_timeout_s=0.2))
        idle = Scripted(Start(200, JSON), b"{}")
        app.ready([idle])
        sent = []

        async def receive():  # a byte now and then: no wait of its own is long
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await asyncio.wait_for(app(scope, receive, send), 5)
        assert sent[0]["status"] == 408
        assert idle.calls == 0

    asyncio.run(go())


def test_metrics_of_all_replicas_with_a_label():
    texts = {i: f'# HELP a_total x\n# TYPE a_total counter\na_total{{k="v"}} {i + 1}.0\n' for i in range(2)}
    merged = merge_metrics(texts, {"dsv3_replica_up": [1.0, 0.0]}, 3).decode()
    assert 'a_total{k="v",replica="0"} 1.0' in merged
    assert 'a_total{k="v",replica="1"} 2.0' in merged
    assert 'dsv3_replica_up{replica="1"} 0.0' in merged
    assert "dsv3_replica_retries_total 3.0" in merged
    assert merged.count("# TYPE a_total") == 1
