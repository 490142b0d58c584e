"""Compute the next items of an iterator in a thread while the caller uses the current one."""

from __future__ import annotations

import collections
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 1) -> Generator[Item, None, None]:
    """Yield the items of an iterator in order, while a thread computes the next ones.

    Args:
        items: the iterator; must not yield None.

    Raises:
        Exception: the exception of `items`, at the same item.
    """
    worker = ThreadPoolExecutor(1, "drn-prefetch")
    try:
        pending = collections.deque(worker.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(worker.submit(next, items, None))
            yield item
    finally:
        # Items that were not started are not needed after an interruption.
        worker.shutdown(cancel_futures=True)
