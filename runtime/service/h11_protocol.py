"""Limit the time of request heads and the number of connections, and report HTTP errors as JSON."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.service.http_errors import HttpError
from runtime.service.middleware import HEADER_BYTES

HEADER_SECONDS = 10.0
LINGER_SECONDS = 1.0
MAX_CONNECTIONS = 512


class Connection(H11Protocol):
    """One HTTP connection, which ends if a request head takes longer than `HEADER_SECONDS`.

    uvicorn has no timeout for request heads, and its `limit_concurrency` applies only after the head and answers in
    plain text.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _is_closing = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._close_with(
                HttpError(503, "Too many connections are open. Try again later.", headers={"retry-after": "1"})
            )
        else:
            self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None and not self._is_closing:
            # A part of the next head, or the rest of a refused body, which h11 reads and drops.
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._close_with(
            HttpError(
                400,
                f"The request is not valid HTTP, or its head exceeds {HEADER_BYTES >> 10} KiB. Send HTTP/1.1 with "
                "shorter headers.",
            )
        )

    def _start_head_timer(self) -> None:
        error = HttpError(408, f"No complete request head arrived in {HEADER_SECONDS:g} s. Send the head at once.")
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._close_with, error)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_with(self, error: HttpError) -> None:
        """Send an error outside of any request, and close the connection."""
        self._stop_head_timer()
        if self._is_closing or self.transport.is_closing():
            return
        self._is_closing = True
        body = error.body()
        extra = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items())
        head = (
            f"HTTP/1.1 {error.status} {error.code}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{extra}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # Closing with unread bytes resets the connection, and the client may lose the answer.
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
