"""Check key, host, size and speed of every request before its route, and add headers to every response."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from runtime.service.http_errors import ClientDisconnected, HttpError, draining, to_http_error
from runtime.service.prometheus import Telemetry

log = logging.getLogger("drn.service")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Host names of this machine's loopback interface.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# Paths that need no key: the page, which prompts for it, the API's description, and the health check.
OPEN = ("/", "/healthz", "/docs", "/openapi.json")
# Maximum size of a request's address and headers.
HEADER_BYTES = 16 << 10
# Longest pause within a body, and its minimum average rate.
BODY_SECONDS = 10.0
BODY_BYTES_PER_SECOND = 16 << 10
# Maximum time until a client reads a chunk of a streamed response.
SEND_SECONDS = 30.0
TICKET_SECONDS = 6 * 3600
REQUEST_ID = "x-request-id"
# https://www.w3.org/TR/trace-context/#traceparent-header: version, trace ID, parent ID and flags.
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_PLAIN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

HEADERS = {
    "content-security-policy": (
        "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclasses.dataclass(frozen=True)
class GateOptions:
    """The API key and the limits of requests.

    Attributes:
        api_key: key that clients must send; None accepts all clients.
        hosts: accepted names of the Host header, without port, in lower case; empty accepts all names.
        json_bytes, upload_bytes: maximum size of a JSON body and of a form.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] = LOOPBACK
    json_bytes: int = 256 << 10
    upload_bytes: int = 512 << 20


class ApiKeys:
    """Check API keys, and sign tickets: time-limited addresses that need no key.

    Args:
        key: the key; None accepts every request.
    """

    def __init__(self, key: str | None) -> None:
        self._key = key

    def ticket(self, path: str) -> str:
        """Add a ticket to a percent-encoded path, so that a video player, which sends no headers, can open it."""
        if self._key is None:
            return path
        until = str(int(time.time()) + TICKET_SECONDS)
        # ASGI decodes the path of a request before `authorizes` gets it.
        return f"{path}?ticket={until}.{self._signature(unquote(path), until)}"

    def authorizes(self, scope: MutableMapping[str, Any], authorization: str) -> bool:
        """Return whether a request has the key or a valid ticket; secrets are compared in constant time."""
        if self._key is None:
            return True
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self._key.encode()):
            return True
        ticket = parse_qs(scope["query_string"].decode("latin-1")).get("ticket", [""])[0]
        until, _, signature = ticket.partition(".")
        return (
            scope["method"] == "GET"
            and until.isdecimal()
            and int(until[:12]) > time.time()
            and hmac.compare_digest(signature.encode(), self._signature(scope["path"], until).encode())
        )

    def _signature(self, path: str, until: str) -> str:
        return hmac.new((self._key or "").encode(), f"{path} {until}".encode(), hashlib.sha256).hexdigest()


def request_id(scope: MutableMapping[str, Any]) -> str:
    """Return the ID of a request for logs.

    That is the trace ID of OpenTelemetry's `traceparent` header, else the `x-request-id` header of at most 64 letters,
    digits, dots, underscores and hyphens, else a random one. `scope` stores it, so that every caller gets the same ID.
    """
    if REQUEST_ID not in scope:
        headers = dict(scope["headers"])
        trace = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
        given = headers.get(REQUEST_ID.encode(), b"")
        if trace:
            scope[REQUEST_ID] = trace[1].decode()
        else:
            scope[REQUEST_ID] = given.decode() if _PLAIN_ID.fullmatch(given) else secrets.token_hex(16)
    identifier: str = scope[REQUEST_ID]
    return identifier


class RequestGuard:
    """An ASGI application that checks and counts requests and passes them to the routes.

    Starlette's `TrustedHostMiddleware` cannot replace the check of hosts: it answers 400 in plain text.
    """

    def __init__(
        self, app: App, options: GateOptions, keys: ApiKeys, telemetry: Telemetry, draining: Callable[[], bool]
    ) -> None:
        self._app = app
        self._options = options
        self._keys = keys
        self._telemetry = telemetry
        self._draining = draining

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0
        replacement: HttpError | None = None

        async def out(message: Message) -> None:
            nonlocal status, replacement
            if message["type"] == "http.response.start":
                status = message["status"]
                replacement = _plain_text_replacement(message)
                head = response_start(replacement) if replacement else message
                identity = (REQUEST_ID.encode(), request_id(scope).encode())
                message = {**head, "headers": [*head.get("headers", ()), *_ENCODED, identity]}
            elif replacement is not None:
                if message.get("more_body"):
                    return
                message = {"type": "http.response.body", "body": replacement.body()}
            if message.get("more_body"):
                await asyncio.wait_for(send(message), SEND_SECONDS)
            else:
                await send(message)

        try:
            try:
                self._check(scope)
                await self._app(scope, _Body(scope, receive, self._limit(scope)), out)
            except (ClientDisconnected, asyncio.TimeoutError):
                status = status or 499
                raise ClientDisconnected from None
            except Exception as error:
                if not isinstance(error, HttpError):
                    log.error("[%s] %s %s failed.", request_id(scope), scope["method"], scope["path"], exc_info=error)
                await self._send_error(to_http_error(error), status, out)
        except ClientDisconnected:
            if status == 499:
                await send({"type": "http.response.start", "status": 499, "headers": [(b"connection", b"close")]})
                await send({"type": "http.response.body"})
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._telemetry.answered(route, status, time.perf_counter() - started)

    async def _send_error(self, error: HttpError, status: int, out: Send) -> None:
        if status:
            # The head of another response is sent already. Only closing the connection shows that it failed.
            raise ClientDisconnected
        self._telemetry.refused(error.code)
        await out(response_start(error))
        await out({"type": "http.response.body", "body": error.body()})

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """Raise HttpError unless a request may pass to its route."""
        head = len(scope["raw_path"]) + len(scope["query_string"])
        if head + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > HEADER_BYTES:
            raise HttpError(431, f"Address and headers exceed {HEADER_BYTES >> 10} KiB. Send shorter ones.")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._options.hosts and name.lower() not in self._options.hosts:
            # DNS rebinding: the name of another site may resolve to this machine, so that its page reads the service.
            raise HttpError(
                403,
                f"Expected the host {' or '.join(self._options.hosts)}, got {host[:80]!r}. Use one of these names, or "
                "start the service with --allow-host.",
                "wrong_host",
            )
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and _host_of(origin) != host:
            raise HttpError(
                403,
                f"Pages of {origin[:80]!r} may not use this service. Use its own page, or a client that is no browser.",
                "wrong_origin",
            )
        path = scope["path"]
        needs_key = path not in OPEN and not path.startswith("/page/")
        if needs_key and not self._keys.authorizes(scope, headers.get("authorization", "")):
            raise HttpError(
                401,
                "This service needs a key. Send it as `Authorization: Bearer KEY`.",
                headers={"www-authenticate": "Bearer"},
            )
        if self._draining() and path not in ("/healthz", "/metrics"):
            raise draining()

    def _limit(self, scope: MutableMapping[str, Any]) -> int:
        kinds = [value for name, value in scope["headers"] if name == b"content-type"]
        multipart = bool(kinds) and kinds[0].lower().startswith(b"multipart/")
        return self._options.upload_bytes if multipart else self._options.json_bytes


class _Body:
    """Receive the body of a request; raise HttpError if it is too large (413) or too slow (408)."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._received = 0
        self._is_complete = False
        self._started = time.monotonic()
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > limit:
                raise self._too_large()

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        allowed = BODY_SECONDS + self._received / BODY_BYTES_PER_SECOND
        timeout = min(BODY_SECONDS, self._started + allowed - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(timeout, 0.001))
        except asyncio.TimeoutError:
            raise HttpError(
                408,
                f"The body arrived too slowly: {self._received} bytes, then a pause. Send at least "
                f"{BODY_BYTES_PER_SECOND >> 10} KiB per second.",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            raise self._too_large()
        self._is_complete = not message.get("more_body", False)
        return message

    def _too_large(self) -> HttpError:
        return HttpError(413, f"The body exceeds the limit of {self._limit} bytes. Send less at once.")


async def cancel_on_disconnect(receive: Receive, work: Awaitable[Any], seconds: float) -> Any:
    """Return the result of `work`, which is cancelled if the client disconnects or after a timeout.

    Args:
        receive: ASGI receive function of the request, after the body is complete.

    Raises:
        ClientDisconnected: the client closed the connection.
        HttpError: 504, after the timeout.
    """
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, disconnected), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if disconnected.done():
            raise ClientDisconnected
        raise HttpError(
            504,
            f"The answer took more than {seconds:g} s. Try again, or send fewer queries at once.",
            headers={"retry-after": "1"},
        )
    finally:
        disconnected.cancel()
        task.cancel()


def response_start(error: HttpError) -> Message:
    """Return the ASGI message that starts the response of an error."""
    headers = {"content-type": "application/json", "content-length": str(len(error.body())), **error.headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": error.status, "headers": encoded}


def _plain_text_replacement(start: Message) -> HttpError | None:
    """Return the JSON error that replaces a plain-text error of Starlette's FileResponse; None for other responses."""
    headers = {bytes(name).lower(): bytes(value) for name, value in start.get("headers", ())}
    if start["status"] < 400 or headers.get(b"content-type") == b"application/json":
        return None
    length = headers.get(b"content-range", b"").rpartition(b"/")[2].decode()
    return HttpError(
        start["status"],
        f"The Range header is invalid{f' for a file of {length} bytes' if length else ''}. Send "
        "`Range: bytes=FIRST-LAST` within the file, or no Range header.",
        headers={"content-range": f"bytes */{length}"} if length else None,
    )


def _host_of(origin: str) -> str | None:
    """Return host and port of an Origin header; None if it is not an address."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


_ENCODED = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
