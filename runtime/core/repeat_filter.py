"""Leave out log messages that repeat, within one piece of work."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger("drn")


class RepeatFilter(logging.Filter):
    """Pass each message a few times.

    Args:
        times: how often a message passes.
        by_template: count messages that differ in their values only as one.
    """

    def __init__(self, times: int = 1, *, by_template: bool = False) -> None:
        super().__init__()
        self._times = times
        self._by_template = by_template
        self._counts: collections.Counter[tuple[int, str]] = collections.Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.levelno, str(record.msg) if self._by_template else record.getMessage()
        self._counts[message] += 1
        return self._counts[message] <= self._times


@contextlib.contextmanager
def said_once(repeats: RepeatFilter | None = None) -> Iterator[None]:
    """Log each message of the block once, however often it is logged: several steps read one data set, and each warns.

    Messages of other threads are in the block too.

    Args:
        repeats: another filter, which may count over several blocks.
    """
    repeats = repeats or RepeatFilter()
    log.addFilter(repeats)
    try:
        yield
    finally:
        log.removeFilter(repeats)
