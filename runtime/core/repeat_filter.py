"""Suppress repeated log messages within one task."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger("drn")


class RepeatFilter(logging.Filter):
    """A filter that passes each message a limited number of times.

    Args:
        by_template: count messages that differ only in their values as one.
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
def logged_once(repeats: RepeatFilter | None = None) -> Iterator[None]:
    """Log each message of the block once, because several steps read one data set and would repeat its warnings.

    Messages of other threads are filtered too.

    Args:
        repeats: a filter to use instead, for example to count over several blocks.
    """
    repeats = repeats or RepeatFilter()
    log.addFilter(repeats)
    try:
        yield
    finally:
        log.removeFilter(repeats)
