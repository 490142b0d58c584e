"""Keys, hosts, sizes and timeouts of requests (`runtime.service.middleware` and `h11_protocol`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import uvicorn

from runtime import Grounder
from runtime.datasets.dataset import DataSet
from runtime.service import h11_protocol, middleware
from runtime.service.middleware import GateOptions
from runtime.service.prometheus import Telemetry
from runtime.service.server import configuration, listen
from runtime.service.service import Service, ServiceOptions
from runtime.service.uploads import UploadOptions
from tests.runtime.service.conftest import KEY, QUESTION, Reply, Running, form


def said(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Send pieces of bytes with pauses, and return the response."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as stream:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(pause)
            stream.sendall(piece)
        return received(stream)


def received(stream: socket.socket) -> bytes:
    actual = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := stream.recv(65536):
            actual += piece
            if b"\r\n\r\n" in actual:
                head, _, body = actual.partition(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                if length and len(body) >= int(length[0].split(b":")[1]):
                    break
    return actual


def reply(raw: bytes) -> Reply:
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return Reply(int(lines[0].split()[1]), headers, body)


@pytest.fixture
def hurried(offline: Grounder, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a service in this process with short timeouts."""
    monkeypatch.setattr(h11_protocol, "HEADER_SECONDS", 0.4)
    monkeypatch.setattr(h11_protocol, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.4)
    options = ServiceOptions(uploads=UploadOptions(tmp_path / "uploads"), gate=GateOptions(json_bytes=1000))
    service = Service(offline, DataSet(planted), options=options)
    server = uvicorn.Server(configuration(service, 5))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()
    service.close()


def asking(body: bytes, length: int | None = None) -> bytes:
    return (
        b"POST /v1/ground HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body) if length is None else length, body)
    )


def test_accepted_connection_has_tcp_nodelay(hurried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    connection_made, options = h11_protocol.Connection.connection_made, []

    def recorded(self: h11_protocol.Connection, transport: Any) -> None:
        connection_made(self, transport)
        options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(h11_protocol.Connection, "connection_made", recorded)
    assert reply(said(hurried, asking(json.dumps(QUESTION).encode()))).status == 200
    assert options == [1]


def test_slow_rest_of_refused_body_ends_the_connection(hurried: int) -> None:
    with socket.create_connection(("127.0.0.1", hurried), timeout=20) as stream:
        stream.sendall(asking(b"", 5000))
        reply(received(stream)).refused(413, code="too_large")
        stream.sendall(b" ")
        reply(received(stream)).refused(408, code="request_timeout")


def test_incomplete_request_times_out(hurried: int) -> None:
    reply(said(hurried, b"GET / HTTP/1.1\r\n", b"Host: local", pause=0.1)).refused(408, code="request_timeout")
    reply(said(hurried)).refused(408, code="request_timeout")
    reply(said(hurried, asking(b'{"video": ', 100))).refused(408, "10 bytes", code="request_timeout")


def test_second_request_head_has_the_same_timeout(hurried: int) -> None:
    with socket.create_connection(("127.0.0.1", hurried), timeout=20) as stream:
        for _ in range(2):
            stream.sendall(asking(json.dumps(QUESTION).encode()))
            assert reply(received(stream)).status == 200
        stream.sendall(b"GET / HT")
        reply(received(stream)).refused(408, code="request_timeout")


def test_slowly_sent_request_body_times_out(hurried: int) -> None:
    # The body is complete at the end, and no single pause exceeds the limit.
    complete = asking(json.dumps(QUESTION).encode())
    head = complete.index(b"\r\n\r\n") + 4
    pieces = [complete[:head], *(complete[offset : offset + 8] for offset in range(head, len(complete), 8))]
    assert len(pieces) == 8
    reply(said(hurried, *pieces, pause=0.1)).refused(408, code="request_timeout")


def test_slow_but_steady_client_is_served(hurried: int) -> None:
    complete = asking(json.dumps(QUESTION).encode())
    middle = len(complete) - 20
    assert reply(said(hurried, complete[:40], complete[40:middle], complete[middle:], pause=0.1)).status == 200


@pytest.mark.parametrize("has_length", [True, False])
def test_body_over_limit_is_rejected_keeping_the_connection(hurried: int, has_length: bool) -> None:
    large = b" " * 5000
    chunked = asking(large).replace(b"Content-Length: 5000", b"Transfer-Encoding: chunked")
    chunked = chunked[: -len(large)] + b"1388\r\n" + large + b"\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hurried), timeout=20) as stream:
        stream.sendall(asking(large) if has_length else chunked)
        reply(received(stream)).refused(413, 1000, code="too_large")
        stream.sendall(asking(json.dumps(QUESTION).encode()))
        assert reply(received(stream)).status == 200


def test_too_many_connections_get_503_with_retry_after(hurried: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", hurried)))
        late = reply(said(hurried))
    late.refused(503, code="unavailable")
    assert late.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\1\2\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
        b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/ground HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/ground HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /v1/ground HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /v1/ground HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_invalid_http_returns_json_error(service: Running, raw: bytes) -> None:
    actual = reply(said(service.port, raw))
    assert 400 <= actual.status < 500 or actual.status == 501
    actual.refused(actual.status)
    assert service.ask(QUESTION).status == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"traceparent": f"00-{'4b' * 16}-{'00f0' * 4}-01", "x-request-id": "mine"}, "4b" * 16),
        ({"x-request-id": "job-7.a_B"}, "job-7.a_B"),
        ({"traceparent": "00-xyz-1-01"}, None),
        ({"x-request-id": "two words"}, None),
        ({"x-request-id": "a" * 65}, None),
        ({}, None),
    ],
)
def test_response_has_request_id(service: Running, headers: dict[str, str], expected: str | None) -> None:
    replies = [service.request("GET", "/healthz", headers=headers) for _ in range(2)]
    replies.append(service.request("GET", "/missing", headers=headers))
    identifiers = [reply.headers["x-request-id"] for reply in replies]
    if expected:
        assert identifiers == [expected] * 3
    else:
        assert len(set(identifiers)) == 3
        assert all(len(identifier) == 32 and int(identifier, 16) >= 0 for identifier in identifiers)


def test_log_of_failed_request_begins_with_request_id(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("the route failed")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    guard: Any = middleware.RequestGuard(
        fail, GateOptions(), middleware.ApiKeys(None), Telemetry(), draining=lambda: False
    )
    headers = [(b"host", b"localhost"), (b"x-request-id", b"job-7")]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/healthz",
        "raw_path": b"/",
        "query_string": b"",
        "headers": headers,
    }
    asyncio.run(guard(scope, None, send))
    assert caplog.messages[0].startswith("[job-7] GET /healthz")
    assert sent[0]["status"] == 500
    assert (b"x-request-id", b"job-7") in sent[0]["headers"]


def test_foreign_host_and_origin_are_rejected(service: Running) -> None:
    port = service.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        service.request("GET", "/healthz", headers={"Host": host}).refused(403, code="wrong_host")
    for host in (f"localhost:{port}", "LOCALHOST", f"127.0.0.1:{port}", "[::1]:80"):
        assert service.request("GET", "/healthz", headers={"Host": host}).status == 200
    for origin in ("http://evil.example", "http://[", "http://[x]", "null", ""):
        service.ask(QUESTION, Origin=origin).refused(403, code="wrong_origin")
    assert service.ask(QUESTION, Origin=f"http://127.0.0.1:{port}").status == 200


def test_requests_without_api_key_are_rejected(locked: Running) -> None:
    for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
        for path in ("/v1/videos", "/v1/videos/SIM00001/media", "/metrics"):
            locked.get(path, **shown).refused(401, "Authorization: Bearer")
        locked.ask(QUESTION, **shown).refused(401)
    for path in ("/", "/healthz", "/docs", "/openapi.json"):
        assert locked.get(path).status == 200
    assert locked.ask(QUESTION, Authorization=f"Bearer {KEY}").status == 200
    assert locked.get("/healthz", Host="films.example").status == 200


def test_media_ticket_is_valid_for_one_video_and_time(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    address = locked.get("/v1/videos/SIM00001", Authorization=f"Bearer {KEY}").json["media"]
    assert locked.get(address).headers["content-type"] == "video/webm"
    path, _, ticket = address.partition("?ticket=")
    until, _, signature = ticket.partition(".")
    other = signature[:-1] + ("1" if signature.endswith("0") else "0")
    for wrong in (f"{int(until) + 1}.{signature}", f"{until}.{other}", f"{until}.", "", f"%B2.{signature}"):
        locked.get(f"{path}?ticket={wrong}").refused(401)
    locked.get(f"/v1/videos?ticket={ticket}").refused(401)
    locked.request("DELETE", f"/v1/videos/SIM00001?ticket={ticket}").refused(401)
    keys = middleware.ApiKeys(KEY)
    scope = {"method": "GET", "path": path, "query_string": f"ticket={ticket}".encode()}
    assert keys.authorizes(scope, "")
    monkeypatch.setattr(time, "time", lambda: int(until) + 1)
    assert not keys.authorizes(scope, "")


def test_media_ticket_matches_the_decoded_path() -> None:
    keys = middleware.ApiKeys(KEY)
    path, _, query = keys.ticket(f"/v1/videos/{quote('50% of é', safe='')}/media").partition("?")
    assert keys.authorizes({"method": "GET", "path": unquote(path), "query_string": query.encode()}, "")


def test_disconnected_clients_free_their_connections(hurried: int) -> None:
    body, kind = form(query="person opens the door")
    head = f"POST /v1/ground HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    complete = asking(json.dumps(QUESTION).encode())
    for _ in range(h11_protocol.MAX_CONNECTIONS):
        for sent in (complete, head.encode() + body[:50]):
            with socket.create_connection(("127.0.0.1", hurried)) as stream:
                stream.sendall(sent)
    ends = time.monotonic() + 20
    while (status := reply(said(hurried, complete)).status) == 503:
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert status == 200
