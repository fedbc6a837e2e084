"""Connections that send no request: raw sockets against both of uvicorn's protocols."""

import json
import socket
import threading
import time

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dsv3.serve.connection import guarded
from tests.serve.small import until

ASK = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


async def hello(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture(params=[H11Protocol, HttpToolsProtocol], ids=["h11", "httptools"], scope="module")
def port(request):
    """A server that gives a request's head 0.4 s and 32 KB, a message 4 MB, and holds 8 connections."""
    http = guarded(request.param, head_s=0.4, head_bytes=32 * 1024, message_bytes=4 * 2**20, most=8)
    server = uvicorn.Server(uvicorn.Config(hello, http=http, log_config=None, lifespan="off", ws="none"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def answered(sock):
    """An answer of "hello" has come, of which the head may come alone."""
    answer = b""
    while b"hello" not in answer:
        part = sock.recv(65536)
        assert part, answer
        answer += part


def rest(sock):
    """All that comes until the server closes."""
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def send_all(sock, pieces, pause=0.0):
    for piece in pieces:
        sock.sendall(piece)
        time.sleep(pause)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: he"], ids=["nothing", "half a head"])
def test_a_connection_that_sends_no_whole_head_is_closed(port, sent):
    with connect(port) as sock:
        sock.sendall(sent)
        assert rest(sock) == b""


def test_a_head_that_trickles_is_closed_too_and_so_is_one_behind_a_request_that_was_answered(port):
    with connect(port) as sock:
        sock.sendall(ASK)
        answered(sock)
        with pytest.raises(ConnectionError):
            send_all(sock, [bytes([byte]) for byte in b"GET / HTTP/1.1\r\nX: " + b"a" * 180], pause=0.02)


def test_a_head_beyond_its_bytes_is_refused_before_it_is_whole(port):
    with connect(port) as sock:
        try:
            send_all(sock, [b"X" * 65536] * 64)
        except ConnectionError:
            return
        answer = rest(sock)
    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"431")


def test_headers_beyond_their_bytes_are_refused(port):
    with connect(port) as sock:
        refused = b""
        try:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n" + b"X-A: " + b"a" * 2_000_000 + b"\r\n\r\n")
            refused = rest(sock)
        except ConnectionError:
            pass
    assert b"hello" not in refused


def test_a_large_body_and_a_slow_one_are_no_matter_of_the_head(port):
    with connect(port) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 300000\r\n\r\n" + b"b" * 100_000)
        time.sleep(0.6)
        sock.sendall(b"b" * 200_000)
        answered(sock)
        sock.sendall(ASK)  # and the connection goes on
        answered(sock)


def test_a_connection_may_carry_any_number_of_messages(port):
    with connect(port) as sock:
        for _ in range(4):
            sock.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 2000000\r\n\r\n" + b"b" * 2_000_000)
            answered(sock)


def test_one_connection_too_many_is_told_so_in_the_apis_shape(port):
    time.sleep(0.6)  # those of other tests are gone
    held = [connect(port) for _ in range(8)]
    try:
        time.sleep(0.1)
        with connect(port) as sock:
            sock.sendall(ASK)
            head, _, body = rest(sock).partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == b"503"
        assert b"retry-after:" in head.lower()
        assert json.loads(body)["error"]["code"] == "service_unavailable"
    finally:
        for sock in held:
            sock.close()
    time.sleep(0.1)
    with connect(port) as sock:
        sock.sendall(ASK)
        answered(sock)


def test_trailers_and_a_body_behind_its_answer_do_not_go_on_for_ever(port):
    begin = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: "
    with connect(port) as sock, pytest.raises(ConnectionError):
        send_all(sock, [begin, *[b"t" * 65536] * 400])
