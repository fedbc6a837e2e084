"""From plan to last byte: silence, faults in the middle, clients that leave or do not read."""

import dataclasses
import json
import socket
import time

import httpx
import pytest

from dsv3.infer.grammar import Refused
from dsv3.serve.settings import ServeSettings
from tests.serve.small import post, running, small_app, small_tokenizer, until

LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 1900, "ignore_eos": True, "seed": 1}


@pytest.fixture
def own():
    """A server of one's own, to break."""
    settings = ServeSettings(model="tiny", keep_alive_s=0.05, send_timeout_s=0.5, max_waiting=4)
    app = small_app(settings, max_running=2)
    with running(app) as url:
        yield app.state.service, url


def idle(service) -> bool:
    return not service.engine.busy and not service.engine.scheduler.book.held and not service.worker.open


def slow_down(service, monkeypatch, seconds):
    step = service.engine.step
    monkeypatch.setattr(service.engine, "step", lambda: time.sleep(seconds) or step())


def test_silence_is_filled_with_comments_in_a_stream(own, monkeypatch):
    service, url = own
    slow_down(service, monkeypatch, 0.2)
    asked = {**LONG, "max_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=30) as answer:
        lines = list(answer.iter_lines())
    assert ": keep-alive" in lines
    assert lines[-2] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_silence_is_filled_with_blank_lines_before_json(own, monkeypatch):
    service, url = own
    slow_down(service, monkeypatch, 0.2)
    answer = post(url, "/v1/completions", {**LONG, "max_tokens": 2})
    assert answer.text.startswith("\n")
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_a_quick_json_answer_has_its_length(own):
    _, url = own
    answer = post(url, "/v1/completions", {**LONG, "max_tokens": 1})
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_at_once(own, stream):
    service, url = own
    with pytest.raises(httpx.ReadTimeout):  # noqa: PT012
        asked = {**LONG, "stream": stream, "n": 2}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=httpx.Timeout(5, read=0.1)) as answer:
            until(lambda: service.engine.scheduler.running)
            for _ in answer.iter_lines():
                raise httpx.ReadTimeout("enough")
    until(lambda: idle(service))


def test_a_client_that_does_not_read_is_dropped(own, monkeypatch):
    service, url = own
    slow_down(service, monkeypatch, 0.002)
    service.worker.max_backlog = 200
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": True, "details": True, "logprobs": 20, "n": 4}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: service.engine.scheduler.running)
        until(lambda: idle(service))
        assert service.engine.stats.answer_tokens < 4 * 1900


def test_a_fault_in_one_answer_fails_it_alone(own, monkeypatch):
    service, url = own
    decide = service.engine._decide

    def unlucky(sequence, *more):
        if sequence.params.seed == 13 and sequence.answered > 3:
            raise RuntimeError("unlucky")
        return decide(sequence, *more)

    monkeypatch.setattr(service.engine, "_decide", unlucky)
    asked = {**LONG, "max_tokens": 20, "temperature": 1}
    failed = post(url, "/v1/completions", {**asked, "seed": 13})
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "server_error"
    with httpx.stream("POST", f"{url}/v1/completions", json={**asked, "seed": 13, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[-1][6:])["error"]["code"] == "internal_error"  # and no [DONE]
    assert post(url, "/v1/completions", asked).status_code == 200
    until(lambda: idle(service))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_at_fault_itself_is_told_so(own, stream):
    service, url = own
    digits = {str(small_tokenizer().encode(digit)[0]): -100 for digit in "0123456789"}
    form = {"type": "regex", "regex": "[0-9]"}
    asked = {**LONG, "response_format": form, "logit_bias": digits, "stream": stream, "ignore_eos": False}
    told = post(url, "/v1/completions", asked)
    error = json.loads(told.text.strip().splitlines()[-1].removeprefix("data: "))["error"]
    assert told.status_code == (200 if stream else 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", "logit_bias")
    until(lambda: idle(service))


def test_of_a_request_at_fault_the_log_quotes_nothing(own, monkeypatch, caplog):
    service, url = own

    def outgrown(*_):
        raise Refused("the grammar could not be followed: zebra")

    monkeypatch.setattr(service.engine, "_decide", outgrown)
    with caplog.at_level("INFO"):
        told = post(url, "/v1/completions", {**LONG, "response_format": {"type": "json_object"}})
    assert told.status_code == 400
    assert told.json()["error"]["message"] == "response_format: the grammar could not be followed: zebra"
    assert "failed: Refused" in caplog.text
    assert "zebra" not in caplog.text


def test_totals_are_timed_from_the_requests_arrival(own, monkeypatch):
    """Reading the body, making tokens of it, compiling a grammar: a client waits for these too."""
    service, url = own
    compiled = service._compile
    monkeypatch.setattr(service, "_compile", lambda grammar: time.sleep(0.3) or compiled(grammar))
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "details": True}
    told = post(url, "/v1/completions", {**asked, "response_format": {"type": "json_object"}}).json()
    totals = told["dsv3"]["totals"]
    assert 0.3 <= totals["first_token_seconds"] <= totals["seconds"]


def test_no_room_is_429_with_retry_after(own, monkeypatch):
    service, url = own
    slow_down(service, monkeypatch, 0.01)
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True, "n": 6}) as running_one:
        lines = running_one.iter_lines()
        next(lines)
        answer = post(url, "/v1/completions", LONG)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
    until(lambda: idle(service))
    assert post(url, "/v1/completions", {**LONG, "max_tokens": 1}).status_code == 200


def test_a_request_that_runs_too_long_is_ended(own, monkeypatch):
    service, url = own
    slow_down(service, monkeypatch, 0.02)
    service.settings = dataclasses.replace(service.settings, request_timeout_s=0.2, keep_alive_s=0)
    assert post(url, "/v1/completions", LONG).status_code == 503
    until(lambda: idle(service))


def test_a_costly_grammar_is_refused_and_holds_nobody_up(own):
    service, url = own
    service.settings = dataclasses.replace(service.settings, grammar_s=0.5)
    patterns = ["(a?){1000}(a?){1000}b", "((a{0,100}){0,100}){0,100}", "(.*a){200}" * 8]
    for pattern in patterns:
        answer = post(
            url, "/v1/completions", {**LONG, "max_tokens": 8, "response_format": {"type": "regex", "regex": pattern}}
        )
        assert answer.status_code in (200, 400, 500), answer.text
        assert post(url, "/v1/completions", {**LONG, "max_tokens": 1}).status_code == 200
    until(lambda: idle(service))
