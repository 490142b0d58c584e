"""One HTTP connection: what uvicorn leaves open is closed here, and what it says in plain text is said in JSON."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.service.http_errors import HttpError
from runtime.service.middleware import HEADER_BYTES

HEADER_SECONDS = 10.0
LINGER_SECONDS = 1.0
MAX_CONNECTIONS = 512


class _Joined:
    """A transport that sends what is written in one turn of the loop at once, as are head and body of an answer."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._waiting and data:
            self._loop.call_soon(self._flush)
        self._waiting += data

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            self._transport.write(self._waiting)
            self._waiting = b""


class Connection(H11Protocol):
    """Ends clients that do not send a whole request head in `HEADER_SECONDS`, and those that are too many."""

    _head_timer: asyncio.TimerHandle | None = None
    _ends = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]
        # What is written of an answer in two pieces: the second would wait until the client has said that it has the
        # first, 40 ms. asyncio sees to it only for sockets that were made with their protocol named.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > MAX_CONNECTIONS:
            self._say(HttpError(503, "Too many connections are open; try again later.", headers={"retry-after": "1"}))
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._ends:
            return
        # The first bytes of another request on this connection have as long as the first one's head; so has the rest of
        # a body that was refused, which is read and dropped, so that the client comes to read why.
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        drained = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if self.cycle is not before or drained:
            self._head_came()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._say(
            HttpError(
                400,
                f"This is no HTTP request, or its head is above {HEADER_BYTES >> 10} KiB; send HTTP/1.1 and shorter "
                "headers.",
            )
        )

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._late)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        self._say(HttpError(408, f"No whole request head came in {HEADER_SECONDS:g} s; send it at once."))

    def _say(self, refusal: HttpError) -> None:
        """Answer outside of any request, and close."""
        self._head_came()
        if not (self.transport.is_closing() or self._ends):
            body = refusal.body()
            extra = "".join(f"{name}: {value}\r\n" for name, value in refusal.headers.items())
            self.transport.write(
                f"HTTP/1.1 {refusal.status} {refusal.code}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n{extra}connection: close\r\n\r\n".encode()
                + body
            )
            # Closed at once with bytes unread, the answer would be lost on its way.
            self._ends = True
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
