"""Define the errors of the HTTP API and their one JSON format."""

from __future__ import annotations

import json
from collections.abc import Mapping

from runtime.core.errors import DeviceError, GroundingError, QueryError, bounded

# The default code of each status.
CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
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
    """A response with an error status.

    Attributes:
        message: what happened and what to do, bounded in length.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.message = bounded(message)
        super().__init__(self.message)
        self.status = status
        self.code = code or CODES.get(status, "error")
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """Return the JSON body of the response."""
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()


class ClientDisconnected(HttpError):
    """The client closed the connection before the response was complete."""

    def __init__(self) -> None:
        super().__init__(499, "The client closed the connection.", "gone")


def to_http_error(error: Exception) -> HttpError:
    """Return the HTTP error for an exception. Messages of device errors and unexpected ones are not sent to clients.

    Status and HTTP code depend on the class of the error alone. `error.code` may be more exact, but clients rely on
    the HTTP codes.
    """
    if isinstance(error, HttpError):
        return error
    if isinstance(error, DeviceError):
        return HttpError(503, "The service cannot do this now. Try again later, or report it to its operator.")
    if isinstance(error, GroundingError):
        return HttpError(422, str(error), "invalid_query" if isinstance(error, QueryError) else None)
    return HttpError(500, "The service failed on this request. Report the time to its operator.")


def draining() -> HttpError:
    """Return the HTTP error for a request that arrives during shutdown."""
    return HttpError(503, "The service is shutting down. Use another one, or try again later.", "draining")


def unknown_video(name: str, suggestion: str = "") -> HttpError:
    """Return the HTTP error for a video that does not exist, or no longer; `suggestion` comes from `near_name`."""
    return HttpError(
        404,
        f"There is no video {name[:80]!r}.{suggestion} GET /v1/videos lists the data set; uploads expire.",
        "unknown_video",
    )
