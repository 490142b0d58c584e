"""Answer requests that fail: one JSON format for all errors."""

from __future__ import annotations

import json
from collections.abc import Mapping

from runtime.core.errors import DeviceError, GroundingError, QueryError, bounded

# Status to the code that stands for it where nothing more exact is known.
CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "not_ready",
    411: "length_required",
    413: "too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    422: "invalid",
    429: "busy",
    431: "headers_too_large",
    500: "internal",
    503: "unavailable",
    504: "timeout",
}


class HttpError(Exception):
    """An answer that says what happened, what was expected and what to do.

    Attributes:
        status: of HTTP.
        message: the sentence.
        code: for programs.
        headers: that go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = bounded(message)
        super().__init__(self.message)
        self.status = status
        self.code = code or CODES.get(status, "error")
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()


def to_http_error(error: GroundingError) -> HttpError:
    """Return the refusal for an error that a client can correct; faults of the service are not described to it.

    Status and HTTP code depend on the class of the error alone: `error.code` may be more exact, but clients rely on
    the HTTP codes.
    """
    if isinstance(error, DeviceError):
        return HttpError(503, "The service cannot do this now; try again later, or report it to its operator.")
    return HttpError(422, str(error), "invalid_query" if isinstance(error, QueryError) else None)


def unknown_video(name: str, near: str = "") -> HttpError:
    """Return the refusal for a video that is not here, or no longer; `near` is what `near_name` returns."""
    return HttpError(
        404,
        f"There is no video {name[:80]!r} here; GET /v1/videos lists those that can be asked, and an upload is "
        f"kept for a while only.{near}",
        "unknown_video",
    )
