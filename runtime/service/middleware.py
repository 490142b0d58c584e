"""Check every request before its route: key, host, size and speed; add headers to every response."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

from runtime.core.errors import GroundingError
from runtime.service.http_errors import HttpError, to_http_error
from runtime.service.prometheus import Telemetry

log = logging.getLogger("drn.service")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Names that a browser on this machine calls it by.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# Answered without a key: the page, which asks for it, and what a load balancer looks at.
OPEN = ("/", "/healthz", "/docs", "/openapi.json")
# Of a request's address and headers.
HEADER_BYTES = 16 << 10
# A body may pause this long, and must come this fast on the whole.
BODY_SECONDS = 10.0
BODY_BYTES_PER_SECOND = 16 << 10
# So long a client may leave a part of a streamed answer unread.
SEND_SECONDS = 30.0
TICKET_SECONDS = 6 * 3600

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
    """The limits and keys of requests.

    Attributes:
        api_key: what clients must show; None lets all in.
        hosts: names that the service is called by, as in a Host header without its port; empty takes any.
        json_bytes, upload_bytes: largest bodies.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] = LOOPBACK
    json_bytes: int = 256 << 10
    upload_bytes: int = 512 << 20


class ApiKeys:
    """Check the keys of requests: everybody without a key, else the key itself or a ticket derived from it."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def ticket(self, path: str) -> str:
        """Return a percent-encoded path so that a player, which sends no headers, can open it for some hours."""
        if self._key is None:
            return path
        until = str(int(time.time()) + TICKET_SECONDS)
        # What is signed is the path as it arrives here, decoded.
        return f"{path}?ticket={until}.{self._signature(unquote(path), until)}"

    def let_in(self, scope: MutableMapping[str, Any], authorization: str) -> bool:
        """Return whether a request may pass; comparisons take as long whatever is shown."""
        if self._key is None:
            return True
        scheme, _, shown = authorization.partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode("latin-1"), self._key.encode()):
            return True
        until, _, signature = _ticket_in(scope["query_string"]).partition(".")
        return (
            scope["method"] == "GET"
            and until.isdecimal()
            and int(until[:12]) > time.time()
            and hmac.compare_digest(signature.encode(), self._signature(scope["path"], until).encode())
        )

    def _signature(self, path: str, until: str) -> str:
        return hmac.new((self._key or "").encode(), f"{path} {until}".encode(), hashlib.sha256).hexdigest()


class ClientDisconnected(Exception):
    """The client has left; there is nobody to answer."""


class RequestGuard:
    """An ASGI application around the routes.

    Args:
        app: the routes.
        options: who may ask, and how much.
        keys: of `options`.
        telemetry: records every answer.
        draining: whether the service ends, and takes no more.
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

        instead: HttpError | None = None

        async def out(message: Message) -> None:
            nonlocal status, instead
            if message["type"] == "http.response.start":
                status = message["status"]
                instead = _in_plain_text(message)
                head = response_start(instead) if instead else message
                message = {**head, "headers": [*head.get("headers", ()), *_ENCODED]}
            elif instead is not None:
                if message.get("more_body"):
                    return
                message = {"type": "http.response.body", "body": instead.body()}
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
            except (HttpError, GroundingError) as error:
                await self._refuse(error if isinstance(error, HttpError) else to_http_error(error), status, out)
            except Exception as error:
                log.error("%s %s failed.", scope["method"], scope["path"], exc_info=error)
                await self._refuse(
                    HttpError(500, "The service failed on this request; report the time to its operator."), status, out
                )
        except ClientDisconnected:
            # Nothing was said, or not all of it: the connection ends.
            if status == 499:
                await send({"type": "http.response.start", "status": 499, "headers": [(b"connection", b"close")]})
                await send({"type": "http.response.body"})
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._telemetry.answered(route, status, time.perf_counter() - started)

    async def _refuse(self, refusal: HttpError, status: int, out: Send) -> None:
        if status:
            # An answer was begun already; its connection can only be cut.
            raise ClientDisconnected
        self._telemetry.refused(refusal.code)
        await out(response_start(refusal))
        await out({"type": "http.response.body", "body": refusal.body()})

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        head = len(scope["raw_path"]) + len(scope["query_string"])
        if head + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > HEADER_BYTES:
            raise HttpError(431, f"The address and headers are above {HEADER_BYTES >> 10} KiB; send shorter ones.")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._options.hosts and name.lower() not in self._options.hosts:
            # A web page elsewhere may have its own name lead to this machine, to read what it serves.
            raise HttpError(
                403,
                f"This service is called {' or '.join(self._options.hosts)} and was asked for as {host[:80]!r}; use "
                "one of these names, or start it with --allow-host.",
                "wrong_host",
            )
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and _host_of(origin) != host:
            raise HttpError(
                403,
                f"A page of {origin[:80]!r} may not ask this service; ask from its own page, or not from a browser.",
                "wrong_origin",
            )
        path = scope["path"]
        open_to_all = path in OPEN or path.startswith("/page/")
        if not open_to_all and not self._keys.let_in(scope, headers.get("authorization", "")):
            raise HttpError(
                401,
                "This service needs a key; send it as `Authorization: Bearer KEY`.",
                headers={"www-authenticate": "Bearer"},
            )
        if self._draining() and path not in ("/healthz", "/metrics"):
            raise HttpError(503, "The service is shutting down; ask another, or this one later.", "draining")

    def _limit(self, scope: MutableMapping[str, Any]) -> int:
        kinds = [value for name, value in scope["headers"] if name == b"content-type"]
        multipart = bool(kinds) and kinds[0].lower().startswith(b"multipart/")
        return self._options.upload_bytes if multipart else self._options.json_bytes


class _Body:
    """The request's body as it comes: Refusal once it is too much, or too slow."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._came = 0
        self._whole = False
        self._started = time.monotonic()
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > limit:
                raise self._too_large()

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        earned = BODY_SECONDS + self._came / BODY_BYTES_PER_SECOND
        left = min(BODY_SECONDS, self._started + earned - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except asyncio.TimeoutError:
            raise HttpError(
                408,
                f"The body came too slowly: {self._came} bytes, then nothing for long; send at least "
                f"{BODY_BYTES_PER_SECOND >> 10} KiB a second.",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        self._came += len(message.get("body", b""))
        if self._came > self._limit:
            raise self._too_large()
        self._whole = not message.get("more_body", False)
        return message

    def _too_large(self) -> HttpError:
        return HttpError(413, f"The body is above the limit of {self._limit} bytes; send less.")


async def cancel_on_disconnect(receive: Receive, work: Awaitable[Any], seconds: float) -> Any:
    """Return what `work` does; once the client has left or time is up it is cancelled.

    Raises:
        Gone: the client has left.
        Refusal: 504, after `seconds`.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnected
        raise HttpError(
            504, f"There was no answer in {seconds:g} s; ask again, or ask less at once.", headers={"retry-after": "1"}
        )
    finally:
        gone.cancel()
        task.cancel()


def response_start(refusal: HttpError) -> Message:
    """Return the head of a refusal's answer."""
    headers = {"content-type": "application/json", "content-length": str(len(refusal.body())), **refusal.headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": refusal.status, "headers": encoded}


def _in_plain_text(start: Message) -> HttpError | None:
    """Return what replaces a library's error in plain text: of files, and ranges of them."""
    headers = {bytes(name).lower(): bytes(value) for name, value in start.get("headers", ())}
    if start["status"] < 400 or headers.get(b"content-type") == b"application/json":
        return None
    length = headers.get(b"content-range", b"").rpartition(b"/")[2].decode()
    return HttpError(
        start["status"],
        f"The Range header asks for what the file does not have{f' in its {length} bytes' if length else ''}; send "
        "`Range: bytes=FIRST-LAST` within its length, or none.",
        headers={"content-range": f"bytes */{length}"} if length else None,
    )


def _host_of(origin: str) -> str | None:
    """Return host and port of an Origin header; None if it is no address."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _ticket_in(query: bytes) -> str:
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        if name == b"ticket":
            return value.decode("latin-1")
    return ""


_ENCODED = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
