"""Leave out log messages that repeat, within one piece of work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger("drn")


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Log each message of the block once, however often it is logged: several steps read one data set, and each warns.

    Messages of other threads are in the block too.
    """
    repeats = _Repeats()
    log.addFilter(repeats)
    try:
        yield
    finally:
        log.removeFilter(repeats)


class _Repeats(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = (record.levelno, record.getMessage())
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new
